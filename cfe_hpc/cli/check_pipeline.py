"""`check JOB` for a job with stages: each as a job of its own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from cfe_hpc.cli import common
from cfe_hpc.errors import ConfigError, ImpossibleError, Problem

__all__ = ["check_stages"]

CheckOne = Callable[[argparse.Namespace, Callable[[dict[str, Any]], None]], int]


def check_stages(args: argparse.Namespace, check_one: CheckOne) -> int:
    """Check every stage, however the others are.

    Args:
        check_one: checks the stage that its arguments name, and gives the document of --json to its second argument.

    Returns:
        The worst of the exit codes.

    Raises:
        ConfigError: a stage is wrong; holds the problems of all stages, each told once.
        ImpossibleError: one could never run; likewise.
    """
    from cfe_hpc.config.stage import load_pipeline

    documents: list[dict[str, Any]] = []
    problems: dict[type[ConfigError | ImpossibleError], dict[str, Problem]] = {ConfigError: {}, ImpossibleError: {}}
    code = 0
    for job in load_pipeline(args.job, args.site, args.set, os.environ):
        if not args.json:
            print(f"stage {job.name}, after {', '.join(job.after) or 'nothing'}\n")

        def keep(document: dict[str, Any], name: str = job.name, after: tuple[str, ...] = job.after) -> None:
            documents.append({"stage": name, "after": list(after), **document})

        try:
            code = max(code, check_one(argparse.Namespace(**{**vars(args), "stage": job.name}), keep))
        except (ConfigError, ImpossibleError) as error:
            problems[type(error)].update({str(problem): problem for problem in error.problems})
        if not args.json:
            print()
    if args.json:
        common.print_json({"stages": documents})
    for kind, found in problems.items():
        if found:
            raise kind(found.values())
    return code
