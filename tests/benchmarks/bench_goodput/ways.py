"""The ways to run the training on Slurm."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from slurm.cluster import Cluster
from spine.harness import LiveRun, site_file, write_job

__all__ = ["OURS", "WAYS", "bare"]

OURS = "cfe_hpc"

Start = Callable[[Cluster, Path, int, int], str]
"""Submits the training into a folder: steps in all, and from one periodic save to the next; the job's id."""


def _programs(folder: Path) -> None:
    for path in (Path(__file__).parent / "programs").iterdir():
        if path.is_file():
            shutil.copy(path, folder)


def _ours(cluster: Cluster, folder: Path, steps: int, every: int) -> str:
    _programs(folder)
    job = write_job(
        folder,
        name="ours",
        entry="ours:train",
        resources={"nodes": 2, "devices_per_node": 1, "cpus_per_device": 8, "time": "1h", "partition": "spot"},
        checkpoint={"every_steps": every, "async": True},
        params={"steps": steps},
    )
    return LiveRun.submit(job, site_file(folder), cwd=folder, env=cluster.env).job_id


def _submitit(cluster: Cluster, folder: Path, steps: int, every: int) -> str:
    _programs(folder)
    return cluster.run(sys.executable, "plain.py", str(steps), str(every), cwd=folder).strip()


def _trap(signals: str) -> Start:
    def start(cluster: Cluster, folder: Path, steps: int, every: int) -> str:
        _programs(folder)
        words = f"PYTHON={sys.executable},STEPS={steps},EVERY={every},SIGNALS={signals}"
        return cluster.sbatch(f"--export=ALL,{words}", "trap.sh", cwd=folder)

    return start


WAYS: dict[str, Start] = {
    OURS: _ours,
    "submitit": _submitit,
    "trap": _trap("USR1"),
    "trap, ranks hear TERM": _trap("USR1 TERM"),
}


def bare(cluster: Cluster, folder: Path, steps: int) -> None:
    """Add a line to the folder's bare.ndjson; the nodes are free."""
    _programs(folder)
    srun = ("srun", "-p", "gpu", "-N2", "--ntasks-per-node=1", "--cpus-per-task=8", "-t", "5")
    cluster.run(*srun, sys.executable, "bare.py", str(steps), cwd=folder, timeout_s=180)
