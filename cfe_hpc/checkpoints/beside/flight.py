"""A save on its way, as one rank sees it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.manifest import Identity

__all__ = ["Flight"]


@dataclass(slots=True, kw_only=True)
class Flight:
    """The save in flight.

    Attributes:
        needed_bytes: of all ranks' files, nearly.
        handed: set when this rank's copy is complete and its writer asked to write it; None before that is begun.
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
    handed: threading.Event | None = None
    problem: str | None = None
    torn: bool = False
    request: dict[str, Any] = field(default_factory=dict)
    to_nodes: bool = False
    complete: bool = False
    node_bytes: int = 0
