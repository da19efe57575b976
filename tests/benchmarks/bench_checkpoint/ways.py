"""Ways of saving and loading, as a rank takes part in them. To add one: a class in a module's table, and in plan.py."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_checkpoint.state import ShardedState


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands."""

    rank: int
    size: int
    threads: int
    group: Any


class Way:
    """One way. Every method is called by all ranks.

    Attributes:
        asynchronous: it has the methods of `beside.Asynchronous` instead of `save`.
        returned_s: monotonic time at which the last `save` would have let training go on, were it not for fsync;
            None when it is no other than the end.
    """

    asynchronous = False
    returned_s: float | None = None

    def __init__(self, state: ShardedState, place: Place) -> None:
        self.state, self.place = state, place

    def start(self) -> None:
        """What a job does before its first save, while it builds its model: not timed."""

    def warm(self) -> None:
        """Make anew what `release` gave back and a job would have kept from its last save: not timed."""
        self.start()

    def save(self, folder: Path) -> None:
        """Save; durable on return."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Fill the state from a folder that as many ranks or others saved."""
        raise NotImplementedError

    def release(self) -> None:
        """Give memory for staging back."""

    def close(self) -> None:
        """Leave nothing behind."""
        self.release()

    def returned(self) -> None:
        """Mark the moment of `returned_s`."""
        self.returned_s = time.monotonic()
