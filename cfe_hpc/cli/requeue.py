"""`requeue RUN`: save a running run and put it back in the queue; send a failed or held one there again."""

from __future__ import annotations

import argparse

from cfe_hpc.cli import common

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

    folder = common.find_run(args)
    outcome = requeue(folder)
    if args.json:
        document = {"run_id": folder.run_id, "job_id": outcome.job_id, "action": outcome.action}
        common.print_json({**document, "followers": list(outcome.followers)})
    else:
        print(outcome.text)
    return 0
