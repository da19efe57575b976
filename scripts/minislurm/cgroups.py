"""Cgroups (v1) of a cluster's nodes: whether this machine lends them, and removing them when the cluster goes down."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minislurm.errors import MinislurmError
from minislurm.processes import wait_until

__all__ = ["give_back", "take"]

_CONTROLLERS = [Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup/memory")]
# Slurm names them by node and job, not by cluster: a second cluster's job 1 on n1 would meet the first one's.
_OWNER = Path("/run/minislurm-cgroups")


def take(root: Path) -> None:
    """Claim this machine's cgroups for the cluster in `root`.

    Raises:
        MinislurmError: they are not there, not ours to write, or another cluster has them.
    """
    for controller in _CONTROLLERS:
        if not (controller / "tasks").exists() or not os.access(controller, os.W_OK):
            raise MinislurmError(f"{controller}: no writable cgroup (v1) here; bring the cluster up without --cgroups")
    owner = Path(_OWNER.read_text()) if _OWNER.exists() else root
    if owner != root and (owner / "cluster.json").exists():
        raise MinislurmError(f"{owner}: has this machine's cgroups; take it down first")
    _OWNER.write_text(str(root))


def give_back(root: Path, nodes: Sequence[str]) -> None:
    """Remove what is left of the nodes' cgroups once their processes have ended, if the cluster in `root` has them."""
    if not _OWNER.exists() or Path(_OWNER.read_text()) != root:
        return
    deadline = time.monotonic() + 5.0
    for top in [controller / f"slurm_{node}" for controller in _CONTROLLERS for node in nodes]:
        for folder, _, _ in list(os.walk(top, topdown=False)):
            wait_until(partial(_removed, Path(folder)), deadline=deadline)
    _OWNER.unlink(missing_ok=True)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # a process that was just killed still counts as there
        return False
    return True
