"""`cancel RUN`: end a run for good."""

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
        "End a run for good: it is never requeued, and its checkpoints stay. A running attempt may still save within "
        "the scheduler's kill time. Cancelling twice, or a run that has ended, does no harm."
    )
    common.add_run_argument(parser)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Cancel, and say what was found."""
    from cfe_hpc.launch.ending import cancel

    folder = common.find_run(args, sweep=True)
    if folder.is_sweep:
        return _cancel_sweep(folder, args)
    outcome = cancel(folder)
    if args.json:
        common.print_json({"run_id": folder.run_id, "job_id": outcome.job_id, "action": outcome.action})
    else:
        print(outcome.text)
    return 0


def _cancel_sweep(sweep: RunFolder, args: argparse.Namespace) -> int:
    from cfe_hpc.launch.sweep import cancel_sweep

    number = cancel_sweep(sweep)
    if args.json:
        common.print_json({"sweep_id": sweep.run_id, "action": "cancelled", "tasks": number})
    else:
        print(f"{sweep.run_id}: cancelled: {number} tasks that had started, and all that had not")
    return 0
