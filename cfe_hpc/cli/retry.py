"""`retry SWEEP`: send those tasks of a sweep again that ended badly, under the same numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfe_hpc.cli import common

if TYPE_CHECKING:
    from cfe_hpc.reports.sweep import TaskStatus

__all__ = ["configure", "run", "select"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "Send tasks of a sweep to the queue again. Each keeps its number, its values and its folder, and goes on from "
        "its own newest checkpoint. Without an option all that failed or are held; with several those of any of them. "
        "Tasks that completed, run or wait are never sent again."
    )
    parser.add_argument("sweep", metavar="SWEEP", help="a sweep's id, a prefix of it, its folder or a job id")
    common.add_site_argument(parser)
    parser.add_argument("--failed", action="store_true", help="all that failed or are held, for whatever reason")
    parser.add_argument("--timed-out", action="store_true", help="those whose time limit came")
    parser.add_argument("--node-failed", action="store_true", help="those whose node failed or was unfit")
    parser.add_argument("--cancelled", action="store_true", help="those that were cancelled")
    parser.add_argument("--dry-run", action="store_true", help="say which would be sent, and send nothing")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Send them; 0 also when there are none, 3 when the scheduler gives no answer."""
    from cfe_hpc.cli.sweep_status import read
    from cfe_hpc.errors import SchedulerError, UsageError

    sweep = common.find_run(args, args.sweep, sweep=True)
    if not sweep.is_sweep:
        raise UsageError(f"{sweep.run_id}: is no sweep; send a run or a task again with `cfe-hpc requeue`")
    tasks, failures = read(sweep)
    if failures:  # a task that runs must not run twice
        raise SchedulerError("; ".join(failures))
    numbers = [task.task for task in select(tasks, args)]
    job_ids: tuple[str, ...] = ()
    followers: list[str] = []
    if numbers and not args.dry_run:
        from cfe_hpc.launch.ending import send_followers
        from cfe_hpc.launch.sweep import retry_tasks

        job_ids = retry_tasks(sweep, numbers).job_ids
        followers = send_followers(sweep)
    if args.json:
        document = {"sweep_id": sweep.run_id, "run_dir": str(sweep.path), "job_ids": list(job_ids), "tasks": numbers}
        document["followers"] = followers
        common.print_json({**document, "dry_run": True} if args.dry_run else document)
    elif not numbers:
        print(f"{sweep.run_id}: no task to send again")
    else:
        from cfe_hpc.launch.ending import behind
        from cfe_hpc.ranks.array_states import ranges

        how = "would go" if args.dry_run else f"go on as job {' '.join(job_ids)}:"
        print(f"{sweep.run_id}: {how} {len(numbers)} tasks: {ranges(numbers)}{behind(followers)}")
    sys.stdout.flush()
    return 0


def select(tasks: Sequence[TaskStatus], args: argparse.Namespace) -> list[TaskStatus]:
    """The tasks that the options mean."""
    all_bad = args.failed or not (args.timed_out or args.node_failed or args.cancelled)
    causes: tuple[str, ...] = ("time_limit",) if args.timed_out else ()
    causes += ("node_failure", "node_unfit") if args.node_failed else ()
    return [
        task
        for task in tasks
        if (task.status.state in ("FAILED", "HELD") and (all_bad or task.cause in causes))
        or (task.status.state == "CANCELLED" and args.cancelled)
    ]
