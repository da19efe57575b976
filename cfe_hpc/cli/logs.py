"""`logs RUN`: the ranks' logs, one or all merged, followed across requeues, or the first error alone."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from cfe_hpc.cli import common
from cfe_hpc.errors import UsageError

if TYPE_CHECKING:
    from cfe_hpc.reports.rank_logs import Follower
    from cfe_hpc.runfolder import RunFolder

__all__ = ["configure", "run"]

_POLL_S = 0.5
_ASK_EVERY_S = 30.0
_ERROR_LINES = 40
_ERROR_RANKS = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "The logs of a run, its ranks' lines merged by the time at which they were written, as far as they say. Lines "
        "of several ranks or attempts are marked [attempt.rank], those of standard error [attempt.rank!]."
    )
    common.add_run_argument(parser)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on with what comes, also after a requeue, until the run ends"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="this rank's only")
    parser.add_argument("--attempt", type=int, metavar="N", help="this attempt's only, from 0")
    parser.add_argument(
        "--first-error",
        action="store_true",
        help="why the newest attempt failed: the rank, its host, the cause, and the end of its log",
    )


def run(args: argparse.Namespace) -> int:
    """Print them."""
    from cfe_hpc.recovery.logfiles import rank_logs
    from cfe_hpc.reports.rank_logs import Follower

    folder = common.find_run(args)
    if args.first_error:
        return _first_error(folder, args)
    follower = Follower(folder, rank=args.rank, attempt=args.attempt)
    if not args.follow and not rank_logs(folder, rank=args.rank, attempt=args.attempt):
        raise UsageError(f"{folder.run_id}: {_nothing(folder, args)}")
    marked = args.follow or len({(log.attempt, log.rank) for log in rank_logs(folder)}) > 1
    marked = marked and not (args.rank is not None and args.attempt is not None)
    if args.follow:
        _follow(folder, follower, marked=marked)
    _print_news(follower, marked=marked, whole=True)
    return 0


def _follow(folder: RunFolder, follower: Follower, *, marked: bool) -> None:
    """Print what comes until the run has ended. A job that vanished leaves no result: the scheduler is asked, too."""
    from cfe_hpc.cli.status import read_statuses

    asked_s = time.monotonic()
    while folder.result() is None:
        _print_news(follower, marked=marked, whole=False)
        if time.monotonic() - asked_s >= _ASK_EVERY_S:
            asked_s = time.monotonic()
            [status], _ = read_statuses([folder])
            if status.state in ("FAILED", "CANCELLED"):
                print(f"{folder.run_id}: {status.state}: {status.reason}", file=sys.stderr)
                return
        time.sleep(_POLL_S)


def _print_news(follower: Follower, *, marked: bool, whole: bool) -> None:
    for log, line in follower.news(whole=whole):
        sys.stdout.write(f"[{log.label}] {line}\n" if marked else f"{line}\n")
    sys.stdout.flush()


def _nothing(folder: RunFolder, args: argparse.Namespace) -> str:
    """Why there is nothing to show, and where to look instead."""
    from cfe_hpc.recovery.logfiles import rank_logs

    there = rank_logs(folder)
    if there:
        attempts = sorted({log.attempt for log in there})
        ranks = max(log.rank for log in there) + 1
        return f"no such log; there are ranks 0 to {ranks - 1} of attempts {', '.join(map(str, attempts))}"
    others = sorted(path for path in folder.logs.glob("*") if path.stat().st_size)
    hint = f"look into {others[0]}" if others else "see `cfe-hpc status` for whether it has started"
    return f"no rank has written a log yet; {hint}"


def _first_error(folder: RunFolder, args: argparse.Namespace) -> int:
    from cfe_hpc.recovery.attempts import cause_of
    from cfe_hpc.recovery.causes import row
    from cfe_hpc.reports.rank_logs import first_failure

    failure = first_failure(folder, attempt=args.attempt)
    if failure is None:
        return _silent_error(folder, args.attempt)
    attempt, rank = failure["attempt"], failure.get("rank")
    host = f" on {failure['host']}" if "host" in failure else ""
    cause, when = row(cause_of(failure)).word, failure.get("time", "at an unknown time")
    print(f"{_who(attempt, rank)}{host}, {when}: {cause}: {failure.get('reason', 'no reason given')}")
    _print_ends(folder, attempt=attempt, rank=rank)
    return 0


def _silent_error(folder: RunFolder, attempt: int | None) -> int:
    """The error of an attempt that ended without a word of its own: what its logs and Slurm's tell."""
    from cfe_hpc.cli.status import read_statuses
    from cfe_hpc.launch.jobs import latest_attempt
    from cfe_hpc.recovery.causes import row
    from cfe_hpc.recovery.evidence import find

    [status], _ = read_statuses([folder])
    number = latest_attempt(folder) if attempt is None else attempt
    if number is None or status.state not in ("FAILED", "HELD"):
        print(f"{folder.run_id}: no attempt has reported an error")
        return 0
    fault = find(folder, attempt=number)
    host = "" if fault.host is None else f" on {fault.host}"
    print(f"{_who(number, fault.rank)}{host}: {row(fault.cause).word}: {fault.why}")
    print(f"{folder.run_id}: {status.reason}")
    _print_ends(folder, attempt=number, rank=fault.rank)
    return 0


def _who(attempt: int, rank: int | None) -> str:
    return f"attempt {attempt}, " + ("no rank in particular" if rank is None else f"rank {rank}")


def _print_ends(folder: RunFolder, *, attempt: int, rank: int | None) -> None:
    """The ends of the ranks' standard error: of one, or of as many as anybody reads."""
    from cfe_hpc.recovery.logfiles import last_lines, rank_logs

    logs = [log for log in rank_logs(folder, rank=rank, attempt=attempt) if log.stream == "err"]
    for log in logs[:_ERROR_RANKS]:
        for line in last_lines(log.path, _ERROR_LINES):
            print(f"[{log.label}] {line}")
    if len(logs) > _ERROR_RANKS:
        print(f"({len(logs) - _ERROR_RANKS} more ranks: `cfe-hpc logs {folder.run_id} --rank N`)")
