"""A save on its way, as one rank sees it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.checkpoints.store import Content
from cfe_hpc.checkpoints.tiers.places import NodeTier

__all__ = ["Flight"]


@dataclass(slots=True, kw_only=True)
class Flight:
    """The save in flight.

    Attributes:
        needed_bytes: of all ranks' files, nearly.
        copied: set when this rank's state is copied, or will never be.
        handed: set when its writer was asked to write it, too; None before any of that is begun.
        problem: why this rank's part was never handed over; None while it may yet be, or was.
        torn: whether that is because the state changed while it was copied.
        request: what the writer was asked.
        to_nodes: the save goes to the nodes first; taken back when it does not fit there.
        complete: it is complete on the nodes, and waits for the one before it to arrive.
        node_bytes: what comes to this node.
    """

    identity: Identity
    draft: Path
    needed_bytes: int
    metrics: dict[str, float]
    began_s: float
    copied: threading.Event = field(default_factory=threading.Event)
    handed: threading.Event | None = None
    problem: str | None = None
    torn: bool = False
    request: dict[str, Any] = field(default_factory=dict)
    to_nodes: bool = False
    complete: bool = False
    node_bytes: int = 0

    def prepare(self, rank: int, data_bytes: int, serial: int) -> None:
        """Set what this rank's writer needs to know to make its file, and to write what is copied by and by."""
        sizes = {"data_bytes": data_bytes, "needed_bytes": self.needed_bytes}
        self.request = {"draft": str(self.draft), "rank": rank, "serial": serial, **sizes}

    def to_node(self, tier: NodeTier, partner: Mapping[str, Any] | None) -> dict[str, Any]:
        """What is different in the request of a save that goes to the nodes first."""
        return {
            "do": "write_to_node",
            "home": str(tier.home),
            "leads": tier.local_rank == 0,
            "node_bytes": self.node_bytes,
            "limit_bytes": tier.limit_bytes,
            "partner": partner,
        }

    def plan(self, content: Content, policy: Retention, protect: Sequence[int]) -> dict[str, Any]:
        """What rank 0's writer needs to commit: what the manifest says, and what stays."""
        return {
            "layout": content.layout,
            "metrics": {name: repr(value) for name, value in self.metrics.items()},
            "policy": asdict(policy),
            "protect": list(protect),
        }
