"""`drill RUN`: a preemption that is none, and whether the run survives it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from cfe_hpc.cli import common
from cfe_hpc.errors import UsageError

if TYPE_CHECKING:
    from cfe_hpc.launch.drill import Report

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "Send a running run the signals of a preemption, and verify that all ranks agreed on a step and saved it, that "
        "the checkpoint is whole, that the run was requeued, resumed there and trained on. Exit codes: 0 passed, 1 "
        "failed, 2 the run is not training, 3 the scheduler refused or cannot be reached."
    )
    common.add_run_argument(parser)
    parser.add_argument(
        "--direct",
        action="store_true",
        help="signal only what proctrack/cgroup would: the direct children of slurmstepd",
    )
    parser.add_argument(
        "--timeout",
        metavar="TIME",
        default="10m",
        help="how long to wait for all of it, from the signal on: 90s, 1h; 10m when left out",
    )
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Drill, and print the verdict."""
    from cfe_hpc.launch.drill import drill
    from cfe_hpc.units import parse_duration_s

    try:
        timeout_s = parse_duration_s(args.timeout)
    except ValueError as error:
        raise UsageError(f"--timeout: {error} ({args.timeout})") from error
    folder = common.find_run(args)
    report = drill(
        folder, direct=args.direct, timeout_s=timeout_s, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    if args.json:
        common.print_json(report.as_json())
    else:
        _print(report)
    return 0 if report.passed else 1


def _print(report: Report) -> None:
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        name = "first_step" if check.name == "went on" else check.name
        when = f"{report.times_s[name]:8.1f} s" if name in report.times_s else " " * 10
        print(f"{'ok' if check.ok else 'NO':<3} {check.name:<{width}} {when}  {check.text}")
    print(f"{report.run_id}: the drill of attempt {report.attempt} {'passed' if report.passed else 'FAILED'}")
