"""`requeue RUN`: save a running run and put it back in the queue; send a failed or held one there again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cfe_hpc.cli import common

if TYPE_CHECKING:
    from cfe_hpc.runfolder import RunFolder

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "A running attempt saves at its next step and goes back to the queue. A run that failed or is held gets a new "
        "job on the same run folder, resuming from its newest checkpoint, with fresh budgets after a hold; those "
        "that were to follow it, and never started, are sent again, too."
    )
    common.add_run_argument(parser)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Requeue, and say how."""
    from cfe_hpc.launch.ending import requeue

    folder = common.find_run(args, sweep=True)
    if folder.is_sweep:
        return _requeue_sweep(folder, args)
    outcome = requeue(folder)
    if args.json:
        document = {"run_id": folder.run_id, "job_id": outcome.job_id, "action": outcome.action}
        common.print_json({**document, "followers": list(outcome.followers)})
    else:
        print(outcome.text)
    return 0


def _requeue_sweep(sweep: RunFolder, args: argparse.Namespace) -> int:
    """All that run save and go back to the queue, all that failed or are held are sent again."""
    from cfe_hpc.cli.sweep_status import read
    from cfe_hpc.errors import SchedulerError, UsageError
    from cfe_hpc.launch.ending import behind, send_followers
    from cfe_hpc.launch.sweep import retry_tasks, save_tasks

    tasks, failures = read(sweep)
    if failures:  # a task that runs must not run twice
        raise SchedulerError("; ".join(failures))
    if all(task.status.state == "CANCELLED" for task in tasks):
        raise UsageError(f"{sweep.run_id}: was cancelled; send its tasks again with `cfe-hpc retry --cancelled`")
    told = save_tasks(sweep)
    again = [task.task for task in tasks if task.status.state in ("FAILED", "HELD")]
    job_ids = retry_tasks(sweep, again).job_ids if again else ()
    followers = send_followers(sweep)
    if args.json:
        document = {"sweep_id": sweep.run_id, "signalled": told, "resubmitted": again, "job_ids": list(job_ids)}
        common.print_json({**document, "followers": followers})
    else:
        numbers = f"{len(told)} tasks save and go back to the queue, {len(again)} are sent again"
        print(f"{sweep.run_id}: {numbers}{behind(followers)}")
    return 0
