"""`status [RUN]`: states, attempts, steps, lost steps, goodput, heartbeats."""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common

if TYPE_CHECKING:
    from cfe_hpc.reports.status import RunStatus, SchedulerWord
    from cfe_hpc.runfolder import RunFolder

__all__ = ["ask", "configure", "read_statuses", "run"]

_NUM_ENDED = 50
_OVER = ("COMPLETED", "FAILED", "CANCELLED")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "State, attempt, step, lost steps, goodput and heartbeat age of one run, or of all there are; for one also "
        "where its allocated time went. Asks the scheduler once, and only about runs that have not ended; not at all "
        "when it was asked less than the site's slurm.poll_interval ago."
    )
    common.add_run_argument(parser, optional=True)
    parser.add_argument("--all", action="store_true", help=f"also runs that ended before the newest {_NUM_ENDED}")
    parser.add_argument(
        "--best",
        metavar="NAME:min|max",
        help="of a sweep's tasks: the logged value to compare them by; checkpoint.keep_best when left out",
    )
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table, or the JSON list; 3 when the scheduler gave no answer, with what the folders alone tell."""
    if args.run:
        folder = common.find_run(args, sweep=True)
        if folder.is_sweep:
            from cfe_hpc.cli.sweep_status import show

            return show(folder, args)
        statuses, failures = read_statuses([folder])
        _print_failures(failures)
        _print(iter(statuses), args)
        if not args.json and statuses[0].buckets:
            sys.stdout.write(_times(statuses[0].buckets))
        return 3 if failures else 0
    from cfe_hpc.launch.jobs import latest_job
    from cfe_hpc.launch.queue import cluster_key
    from cfe_hpc.reports.roster import Roster

    roster = Roster(common.roots(args), latest_job, cluster=cluster_key())
    words, failures = ask(roster.unsettled())
    _print_failures(failures)
    _print(roster.statuses(words), args)
    return 3 if failures else 0


def read_statuses(folders: Sequence[RunFolder]) -> tuple[list[RunStatus], list[str]]:
    """(the runs' statuses, what the schedulers that gave no answer said)."""
    from cfe_hpc.launch.jobs import latest_job
    from cfe_hpc.reports.status import is_settled, read_status

    jobs = {folder.path: latest_job(folder) for folder in folders}
    live = [(folder, job) for folder in folders if (job := jobs[folder.path]) is not None and not is_settled(folder)]
    words, failures = ask(live)
    statuses = []
    for folder in folders:
        job = jobs[folder.path]
        job_id = None if job is None else str(job["job_id"])
        statuses.append(read_status(folder, job_id=job_id, word=words.get(job_id or "")))
    return statuses, failures


def ask(live: Sequence[tuple[RunFolder, dict[str, Any]]]) -> tuple[dict[str, SchedulerWord], list[str]]:
    """(every scheduler's word on its jobs, by job id; what those that gave no answer said): one call each, or none
    when the last is young enough.

    Args:
        live: runs that have not ended, with their newest jobs; the last one's site says how often it may be asked.
    """
    from cfe_hpc.errors import SchedulerError
    from cfe_hpc.launch.queue import job_states, poll_interval_s
    from cfe_hpc.reports.status import SchedulerWord

    asked: dict[str, list[dict[str, Any]]] = {}
    newest: dict[str, RunFolder] = {}
    for folder, job in live:
        asked.setdefault(str(job["scheduler"]), []).append(job)
        newest[str(job["scheduler"])] = folder
    words: dict[str, SchedulerWord] = {}
    failures = []
    for scheduler, records in asked.items():
        try:
            states = job_states(scheduler, records, max_age_s=poll_interval_s(newest[scheduler]))
        except SchedulerError as error:
            failures.append(str(error))
            silent = SchedulerWord(state="UNKNOWN", reason="the scheduler gave no answer")
            words.update((str(job["job_id"]), silent) for job in records)
            continue
        for job_id, known in states.items():
            words[job_id] = SchedulerWord(state=known.state, reason=known.reason, nodes=known.nodes)
    return words, failures


def _print_failures(failures: Sequence[str]) -> None:
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)


def _print(statuses: Iterator[RunStatus], args: argparse.Namespace) -> None:
    """The JSON list, one status after the other, or the table."""
    if args.json:
        _print_list(statuses, indent=2 if args.run else None)
        return
    hidden, ended, rows = 0, deque[int](), []
    for status in statuses:
        rows.append("\t".join(_row(status)))
        if status.state in _OVER and not args.all and not args.run:
            ended.append(len(rows) - 1)
            if len(ended) > _NUM_ENDED:
                rows[ended.popleft()] = ""
                hidden += 1
    shown = [row for row in rows if row]
    sys.stdout.write(_table(shown) if shown else "no runs here; `cfe-hpc submit JOB` makes one\n")
    if hidden:
        print(f"({hidden} that ended before: `cfe-hpc status --all`)")


def _print_list(statuses: Iterator[RunStatus], *, indent: int | None) -> None:
    """One JSON list, a run at a time: of thousands none need be kept."""
    before = "[\n"
    for status in statuses:
        facts = {name: getattr(status, name) for name in status.__slots__}
        sys.stdout.write(before + json.dumps(facts, indent=indent, ensure_ascii=False))
        before = ",\n"
    sys.stdout.write("[]\n" if before == "[\n" else "\n]\n")


_HEADINGS = ("RUN", "STATE", "JOB", "ATTEMPT", "STEP", "LOST", "GOODPUT", "HEARTBEAT", "REASON")


def _table(rows: Sequence[str]) -> str:
    """Rows of cells with tabs between them, under headings, in columns as wide as their widest cell."""
    widths = [len(heading) for heading in _HEADINGS]
    for row in rows:
        widths = [max(width, len(cell)) for width, cell in zip(widths, row.split("\t"), strict=True)]
    lines = []
    for row in ("\t".join(_HEADINGS), *rows):
        cells = zip(row.split("\t"), widths, strict=True)
        lines.append("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
    return "\n".join(lines) + "\n"


def _row(status: RunStatus) -> tuple[str, ...]:
    from cfe_hpc.units import format_duration

    age_s = status.heartbeat_age_s
    total = "" if status.total_steps is None else f"/{status.total_steps}"
    return (
        status.run_id,
        status.state,
        status.job_id or "-",
        "-" if status.attempt is None else str(status.attempt),
        "-" if status.step is None else f"{status.step}{total}",
        str(status.lost_steps),
        "-" if status.goodput is None else f"{status.goodput:.1%}",
        "-" if age_s is None else f"{format_duration(age_s)} ago",
        status.reason.splitlines()[0][:100].replace("\t", " ") if status.reason else "",
    )


def _times(buckets: Mapping[str, float]) -> str:
    """Where the time went: a line for each bucket that holds any, with its share of the allocated time."""
    held_s = sum(seconds for bucket, seconds in buckets.items() if bucket != "queue")
    rows = [("TIME", "SECONDS", "OF ALLOCATED")]
    for bucket, seconds in [*buckets.items(), ("allocated", held_s)]:
        share = "" if bucket == "queue" or not held_s else f"{seconds / held_s:.1%}"
        if seconds:
            rows.append((bucket, f"{seconds:.1f}", share))
    lines = (f"{name:<10}  {seconds:>10}  {share:>12}".rstrip() for name, seconds, share in rows)
    return "\n" + "\n".join(lines) + "\n"
