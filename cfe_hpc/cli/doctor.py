"""`doctor`: what this machine and this cluster can do, with the reason for each answer."""

from __future__ import annotations

import argparse
import os

from cfe_hpc.cli import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "What this machine and this cluster can do, with the reason for each answer. Ends with 1, or 3 for the "
        "scheduler, when something is missing that the site's runs need (marked NO; a plain no harms nobody)."
    )
    common.add_site_argument(parser)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the answers."""
    from dataclasses import asdict

    from cfe_hpc.config.load import load_site
    from cfe_hpc.reports.doctor import examine

    site, shown_as = load_site(args.site, os.environ)
    answers = []
    if not args.json:
        print(f"site {site.name} ({shown_as})")
    for answer in examine(site):
        answers.append(answer)
        if not args.json:
            word = "yes" if answer.ok else "NO" if answer.needed else "no"
            print(f"{answer.topic:<9}  {word:<3}  {answer.can}: {answer.reason}", flush=True)
    if args.json:
        common.print_json([asdict(answer) for answer in answers])
    missing = [answer.topic for answer in answers if answer.needed and not answer.ok]
    return 3 if "scheduler" in missing else 1 if missing else 0
