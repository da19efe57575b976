"""`report RUN…`: what became of runs, attempt by attempt, and where their time went."""

from __future__ import annotations

import argparse
import sys

from cfe_hpc.cli import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "A run's attempts with their causes, where its time went attempt by attempt, and the events that tell of "
        "trouble, as Markdown on standard output."
    )
    common.add_run_argument(parser, several=True)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the reports, or a JSON list of them; 3 when the scheduler gave no answer, with what the folders tell."""
    from cfe_hpc.cli.status import read_statuses
    from cfe_hpc.reports.report import markdown, read_report

    named = [common.find_run(args, ref, sweep=True) for ref in args.run]
    folders = [each for folder in named for each in (folder.tasks() if folder.is_sweep else [folder])]
    statuses, failures = read_statuses(folders)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    reports = [read_report(folder, status) for folder, status in zip(folders, statuses, strict=True)]
    if args.json:
        common.print_json(reports)
    else:
        sys.stdout.write("\n".join(markdown(report) for report in reports))
    return 3 if failures else 0
