"""What every job script has in common: environment, modules and set-up lines, each value quoted for the shell."""

from __future__ import annotations

import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import cfe_hpc
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.launch.interpreter import editable, import_roots
from cfe_hpc.launch.preparation import preparation, verification
from cfe_hpc.launch.refusing import refusal
from cfe_hpc.runfolder import RunFolder

__all__ = ["environment_of", "exports", "imports", "prologue"]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def environment_of(spec: RunSpec) -> dict[str, str]:
    """Variables that site and job set for every rank; the job's win.

    Raises:
        ConfigError: a name is no variable's, or a value holds what no environment can.
    """
    problems: list[Problem] = []
    sources: tuple[tuple[str, str, Mapping[str, str]], ...] = (
        (spec.provenance.site_file, "network.environment", spec.site.network.environment),
        (spec.provenance.job_file, "environment.variables", spec.job.environment.variables),
        (spec.provenance.job_file, "launch.environment", spec.job.launch.environment),
    )
    merged: dict[str, str] = {}
    for file, table, variables in sources:
        for name, value in variables.items():
            key = f"{table}.{name}"
            if not _VARIABLE.fullmatch(name):
                remedy = "use letters, digits and underscores, no digit first"
                problems.append(Problem(file=file, key=table, what="not a variable's name", value=name, remedy=remedy))
            elif "\0" in value:
                problems.append(
                    Problem(file=file, key=key, what="holds a NUL byte", remedy="environments cannot; remove it")
                )
            merged[name] = value
    if problems:
        raise ConfigError(problems)
    return merged


def prologue(spec: RunSpec, folder: RunFolder) -> list[str]:
    """Shell lines that prepare a node: variables, modules, an environment, the site's own lines as they stand; and that
    end the run when something of it is missing.

    Raises:
        ConfigError: `[environment]` names a variable that is not set, or one that no shell can have.
    """
    lines = _task_dir(folder) if _is_array(spec) else _run_dir(folder)
    lines += refusal(spec)
    lines += [*imports(spec), *exports(spec)]
    return [*lines, *preparation(spec), *spec.job.environment.setup, *verification(spec)]


def imports(spec: RunSpec) -> list[str]:
    """The line, if one is needed, that lets the run's Python find this package and the run's own code."""
    paths = _import_paths(spec)
    return [f'export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}"${{PYTHONPATH:+:$PYTHONPATH}}"'] if paths else []


def exports(spec: RunSpec) -> list[str]:
    """Lines that set what `environment_of` tells."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment_of(spec).items()]


def _import_paths(spec: RunSpec) -> list[str]:
    """What must be on PYTHONPATH: the snapshot's place of all that is imported from the work tree, and this package."""
    provenance = spec.provenance
    parent = _package_parent(provenance.python)
    paths = [] if parent is None else [str(parent)]
    if provenance.snapshot is None or provenance.work_tree is None:
        return paths
    tree, snapshot = Path(provenance.work_tree), Path(provenance.snapshot)
    found = [Path(path) for path in (*import_roots(provenance.python, os.environ), *paths)]
    copied = [str(snapshot / path.relative_to(tree)) for path in found if path.is_relative_to(tree)]
    return list(dict.fromkeys([*copied, *(path for path in paths if not Path(path).is_relative_to(tree))]))


def _is_array(spec: RunSpec) -> bool:
    """Whether the script is that of all tasks of a sweep; on this machine each has one of its own."""
    return spec.job.sweep is not None and spec.site.scheduler == "slurm"


def _run_dir(folder: RunFolder) -> list[str]:
    task = [] if folder.sweep_task is None else [f"export CFE_SWEEP_TASK={folder.sweep_task}"]
    return [f"export CFE_RUN_DIR={shlex.quote(str(folder.path))}", *task]


def _task_dir(sweep: RunFolder) -> list[str]:
    """Lines of an array's script: which task this is, by its index or, outside of an array, by its number; and all that
    the script says goes to that task's folder from here on."""
    return [
        f"export CFE_SWEEP_DIR={shlex.quote(str(sweep.path))}",
        'export CFE_SWEEP_TASK="${CFE_SWEEP_TASK:-$((CFE_SWEEP_OFFSET + SLURM_ARRAY_TASK_ID))}"',
        'export CFE_RUN_DIR="$CFE_SWEEP_DIR/tasks/$(printf %06d "$CFE_SWEEP_TASK")"',
        'mkdir -p -- "$CFE_RUN_DIR/logs" || exit 1',
        'log="$CFE_RUN_DIR/logs/${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}.batch"',
        'exec >>"$log.out" 2>>"$log.err"',
    ]


@cache
def _package_parent(python: str) -> Path | None:
    """The folder that must be on PYTHONPATH for `python` to import this package; None when it finds it itself."""
    parent = Path(cfe_hpc.__file__).resolve().parent.parent
    site_folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if parent in site_folders or "site-packages" in parent.parts:
        return None  # another interpreter's packages must never be mixed into the one on the nodes
    found = python == sys.executable and any(parent in editable(folder, "cfe_hpc") for folder in site_folders)
    return None if found else parent
