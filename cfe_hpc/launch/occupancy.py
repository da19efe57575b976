"""How full a cluster's partitions are: one sinfo call, no more often than once a minute."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from cfe_hpc.caches import recall, remember
from cfe_hpc.launch.queue import cluster_key
from cfe_hpc.process import CommandError, run

__all__ = ["Occupancy", "occupancy"]

_TIMEOUT_S = 30.0
_MAX_AGE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Nodes of one partition; `other` are down, drained or otherwise of no use now. They add up to `total`."""

    partition: str
    up: bool
    allocated: int
    idle: int
    other: int
    total: int


def occupancy() -> tuple[Occupancy, ...]:
    """All partitions that the user may see, in sinfo's order; none where there is no Slurm, or no answer."""
    if shutil.which("sinfo") is None:
        return ()
    name = f"sinfo-{cluster_key()}.json"
    kept = recall(name, max_age_s=_MAX_AGE_S)
    if kept is None:
        try:
            printed = run(["sinfo", "--noheader", "-o", "%R|%a|%F"], timeout_s=_TIMEOUT_S).stdout
        except CommandError:
            printed = ""
        kept = {"printed": printed}
        remember(name, kept)
    return parse(kept["printed"])


def parse(printed: str) -> tuple[Occupancy, ...]:
    """The partitions in sinfo's output: name, up or down, and nodes as allocated/idle/other/total."""
    found = []
    for line in printed.splitlines():
        partition, state, nodes = line.strip().rsplit("|", 2)
        allocated, idle, other, total = (_count(part) for part in nodes.split("/"))
        found.append(
            Occupancy(partition=partition, up=state == "up", allocated=allocated, idle=idle, other=other, total=total)
        )
    return tuple(found)


def _count(text: str) -> int:
    """sinfo writes thousands as "1.2K" where there are many."""
    factor = {"K": 1024, "M": 1024**2}.get(text[-1:], 1)
    return round(float(text.rstrip("KM")) * factor)
