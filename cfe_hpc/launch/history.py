"""What earlier runs of a job have measured, for the plan of the next one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import expand_runs_root
from cfe_hpc.errors import ConfigError
from cfe_hpc.files import read_toml
from cfe_hpc.launch.plan import plan
from cfe_hpc.recovery.measured import Measured
from cfe_hpc.runfolder import RUN_ID, RunFolder, safe_name

__all__ = ["find_measured", "plan_with_history"]

_LOOKED_AT = 3
"""Runs whose results are read: submitting must not become slower with every run."""


def plan_with_history(loaded: Loaded) -> tuple[Plan, Measured | None]:
    """The plan, with the lead of its signal from what an earlier run of the job has measured in the same partition.

    Raises: as `launch.plan.plan`.
    """
    planned = plan(loaded.job, loaded.site, loaded.origins)
    measured = find_measured(loaded, planned)
    if measured is None:
        return planned, None
    return plan(loaded.job, loaded.site, loaded.origins, measured=measured), measured


def find_measured(loaded: Loaded, planned: Plan) -> Measured | None:
    """What the newest of the last few runs of the job has measured, of those at this site and in this partition."""
    try:
        jobs_folder = expand_runs_root(loaded.site, os.environ) / safe_name(loaded.job.name)
        names = sorted((name for name in os.listdir(jobs_folder) if RUN_ID.match(name)), key=_stamp, reverse=True)
    except (ConfigError, OSError):  # told, where it matters, by whoever needs the folder
        return None
    for name in names[:_LOOKED_AT]:
        folder = RunFolder(jobs_folder / name)
        measured = _read((folder.result() or {}).get("measured"))
        if measured is not None and _place(folder.run_toml) == (loaded.site.name, planned.partition):
            return measured
    return None


def _stamp(run_id: str) -> str:
    """When a run was submitted, as its id says; names of jobs may meet in one folder."""
    return "-".join(run_id.rsplit("-", 3)[1:3])


def _read(values: Any) -> Measured | None:
    try:
        return Measured(**values)
    except TypeError:  # there is none, or it is of another version
        return None


def _place(run_toml: Path) -> tuple[str, str] | None:
    """(site, partition) of a run."""
    try:
        table = read_toml(run_toml)
        return table["site"]["name"], table["plan"]["partition"]
    except (ConfigError, KeyError, TypeError):
        return None
