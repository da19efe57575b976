"""What the tests of the launch side share: specs without files, and rank programs small enough to read."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cfe_hpc.config.job import Job
from cfe_hpc.config.run import Plan, Provenance, RunSpec
from cfe_hpc.config.site import Preemption, Site
from cfe_hpc.runfolder import RunFolder


def make_spec(
    workdir: Path,
    *,
    scheduler: str = "local",
    job: dict[str, Any] | None = None,
    site: dict[str, Any] | None = None,
    python: str = sys.executable,
    kill_wait_s: float = 20.0,
    **plan: Any,
) -> RunSpec:
    """A resolved run that only says what a test cares about.

    Args:
        job: keys of the job file.
        site: tables of the site profile.
        plan: fields of the plan.
    """
    fields: dict[str, Any] = {
        "partition": "p",
        "queue": "p",
        "nodes": 1,
        "devices_per_node": 1,
        "cpus_per_device": 1,
        "accelerator": "cpu",
        "signal": "USR2",
        "signal_lead_s": 1,
        "preemption": Preemption(),
        **plan,
    }
    fields["world_size"] = fields["nodes"] * fields["devices_per_node"]
    hardware = {"accelerator": "cpu", "devices_per_node": 8, "cores_per_node": 8, "memory": "8GiB"}
    profile = {
        "name": "here",
        "scheduler": scheduler,
        "default_partition": "p",
        "partitions": {"p": {"hardware": "h"}},
        "hardware": {"h": hardware},
        "slurm": {"kill_wait": kill_wait_s},
        **(site or {}),
    }
    environment = profile.get("environment", {})  # as loading lays it under the job's
    return RunSpec(
        run_id="job-20260101-000000-abcd",
        job=Job.model_validate({"name": "job", "command": ["true"], "environment": environment, **(job or {})}),
        site=Site.model_validate(profile),
        plan=Plan(**fields),
        provenance=Provenance(
            user="u",
            host="h",
            time="2026-01-01T00:00:00.000Z",
            workdir=str(workdir),
            python=python,
            job_file="job.toml",
            site_file="site.toml",
        ),
    )


def make_folder(root: Path, spec: RunSpec) -> RunFolder:
    """A run folder on disk that holds `spec`."""
    folder = RunFolder.create(root, spec.job.name)
    spec.write(folder.run_toml)
    return folder


def events(folder: RunFolder, *names: str) -> list[dict[str, Any]]:
    """The run's events of these names."""
    return [event for event in folder.events() if event["event"] in names]


def pid_exists(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def kill_quietly(pid: int) -> None:
    """SIGKILL to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
