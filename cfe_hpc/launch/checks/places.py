"""Checks of files and folders: data, the runs root, programs, the work tree."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from cfe_hpc.config.site import expand_runs_root
from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.process import CommandError, run

__all__ = ["data_missing", "git_dirty", "program_missing", "runs_root", "runs_root_private"]


def data_missing(facts: Facts) -> Iterator[Problem]:
    if facts.params is None or facts.params.data == "stdlib":
        return
    if not Path(facts.params.data).expanduser().is_file():
        remedy = "build it with `cfe-hpc data build`, or check the path"
        yield facts.problem("job.params.data", "no such token file", remedy, facts.params.data)


def _standing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _root(facts: Facts) -> Path:
    return expand_runs_root(facts.site, os.environ, file=facts.file_of("site.storage.runs_root"))


def runs_root(facts: Facts) -> Iterator[Problem]:
    root = _root(facts)
    standing = _standing(root)
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        remedy = "choose a folder that you may write to"
        yield facts.problem("site.storage.runs_root", f"cannot be written under {standing}", remedy, str(root))


def runs_root_private(facts: Facts) -> Iterator[Problem]:
    root = _root(facts)
    if facts.on_slurm and facts.plan.nodes > 1 and root.is_relative_to("/tmp"):
        what, remedy = "lies under /tmp, which each node has for itself", "choose a folder that every node sees"
        yield facts.problem("site.storage.runs_root", what, remedy, str(root))


def program_missing(facts: Facts) -> Iterator[Problem]:
    job, environment = facts.job, facts.site.environment
    if job.entry is not None and environment.python is None:
        top = job.entry.split(":")[0].split(".")[0]
        here = facts.workdir
        if find_spec(top) is None and not (here / top).is_dir() and not (here / f"{top}.py").is_file():
            what, remedy = f"no module named {top} here", "install it, or submit from the folder that holds it"
            yield facts.problem("job.entry", what, remedy, job.entry)
    if job.command is not None and not environment.modules and not environment.setup:
        program = job.command[0]
        if "{" not in program and shutil.which(program) is None:
            what, remedy = "no such program on this machine", "check the name, or name its path"
            yield facts.problem("job.command", what, remedy, program)


def git_dirty(facts: Facts) -> Iterator[Problem]:
    try:
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"], timeout_s=5).stdout.splitlines()
    except CommandError:  # no git, or no work tree: nothing to compare with
        return
    if changed:
        what = f"the work tree has uncommitted changes in {len(changed)} tracked files"
        remedy = "commit them so that the run can be repeated; the hash of the difference is recorded"
        yield Problem(file=str(facts.workdir), key="", what=what, remedy=remedy)
