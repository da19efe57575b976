"""The places a checkpoint lies in, as ranks and the login side see them: nodes, shared filesystem, remote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.checkpoints.tiers import nodelocal
from cfe_hpc.files import append_ndjson, read_ndjson
from cfe_hpc.runfolder import utc_now

__all__ = ["NodeTier", "Tier", "bytes_on_node", "places_of", "record", "tiers_of"]

Tier = Literal["local", "remote"]

_RECORD = "tiers.ndjson"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTier:
    """The node-local tier as one rank takes part in it.

    Attributes:
        home: this node's folder for the run's checkpoints.
        node: this node's number among the attempt's.
        local_rank: the rank's number on its node; 0 looks after the folder.
        hosts: the nodes' names, in their order.
        address: what other nodes reach this one by.
        keep_last: durable checkpoints that also stay on the node.
        limit_bytes: the most that this run may take on a node; None for what there is.
        partner: whether each shard is also written on another node.
    """

    home: Path
    node: int
    local_rank: int
    hosts: tuple[str, ...]
    address: str
    keep_last: int
    limit_bytes: int | None
    partner: bool

    def folder(self, identity: Identity) -> Path:
        """This node's folder for one save."""
        return self.home / nodelocal.copy_name(identity)


def bytes_on_node(tier: NodeTier, sizes: Sequence[tuple[int, int]]) -> int:
    """What comes to this node of a save.

    Args:
        sizes: each rank's node and the bytes of its shard.
    """
    nodes = sorted({node for node, _ in sizes})
    before = nodes[nodes.index(tier.node) - 1]
    comes = {tier.node, before} if tier.partner else {tier.node}
    return sum(size for node, size in sizes if node in comes)


def places_of(tier: NodeTier | None, shared: Path, identity: Identity, rank: int) -> Sequence[Path]:
    """Folders with a copy of a rank's shard, the nearest first: this node's, if it holds one, and the shared one."""
    if tier is None:
        return (shared,)
    near = tier.folder(identity)
    return (near, shared) if nodelocal.has_shard(near, rank) else (shared,)


def record(root: Path, step: int, attempt: int, tier: Tier, where: Sequence[str], *, gone: bool = False) -> None:
    """Note where a checkpoint lies, or no longer lies, beside the shared filesystem: a line of tiers.ndjson.

    Args:
        root: the checkpoints folder.
        where: node names, or a URL.

    Raises:
        OSError: it cannot be noted.
    """
    line: dict[str, Any] = {"time": utc_now(), "step": step, "attempt": attempt, "tier": tier, "where": list(where)}
    append_ndjson(root / _RECORD, {**line, "gone": True} if gone else line)


def tiers_of(root: Path) -> dict[int, list[str]]:
    """Where each step's checkpoint lies, as far as this machine can know: "local", "shared", "remote", by step.

    What nodes hold is what was last noted of them: they may have lost it since.
    """
    there: dict[int, dict[str, bool]] = {}
    for line in _lines(root):
        there.setdefault(line["step"], {})[line["tier"]] = not line.get("gone", False)
    for step, _ in folders.committed(root):
        there.setdefault(step, {})["shared"] = True
    ordered = {
        step: [tier for tier in ("local", "shared", "remote") if found.get(tier)] for step, found in there.items()
    }
    return {step: tiers for step, tiers in ordered.items() if tiers}


def _lines(root: Path) -> Iterator[dict[str, Any]]:
    for line in read_ndjson(root / _RECORD):
        if isinstance(line.get("step"), int) and line.get("tier") in ("local", "remote"):
            yield line
