"""`watch [RUN]`: a live screen of runs, queue and nodes."""

from __future__ import annotations

import argparse
import sys

from cfe_hpc.cli import common
from cfe_hpc.errors import UsageError

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "A live screen: runs with their states and reasons, steps, loss, goodput and heartbeats, and how full the "
        "partitions are. Keys: l follows a run's log, s has it save and go back to the queue, c cancels it, q leaves."
    )
    common.add_run_argument(parser, optional=True)


def run(args: argparse.Namespace) -> int:
    """Show it until its reader leaves."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("watch: this is no terminal; use `cfe-hpc status`, with --json for programs")
    # Imported here: the screen takes a quarter of a second to load.
    from cfe_hpc.cli.status import ask
    from cfe_hpc.screen.app import WatchApp
    from cfe_hpc.screen.feed import Feed

    chosen = common.find_run(args) if args.run else None
    WatchApp(Feed(roots=common.roots(args), ask=ask, only=chosen)).run()
    return 0
