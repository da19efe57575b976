"""Whether a helper process gets on: it tells while bytes move; one that tells nothing for long is given up.

Nothing else tells a disk that is slow from one that will never answer: a process that waits for either can neither be
asked nor killed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cfe_hpc.checkpoints.io.staging import Arena, Staged

__all__ = ["PULSE_S", "SILENCE_S", "Moving", "Pulse"]

PULSE_S = 5.0
"""What moves is told of no more often."""

SILENCE_S = 600.0
"""A helper that has told nothing for so long is given up. A parallel filesystem may stand still for minutes while one
of its servers is replaced by another, and the last sync of a file that went through the page cache tells nothing."""


class Pulse:
    """Tells that bytes move; from any thread."""

    def __init__(self, tell: Callable[[], None]) -> None:
        """`tell` is called at most every PULSE_S seconds, by one thread at a time."""
        self._tell, self._told_s = tell, time.monotonic()
        self._lock = threading.Lock()

    def beat(self) -> None:
        """Something has moved."""
        if time.monotonic() - self._told_s < PULSE_S:
            return
        with self._lock:
            if time.monotonic() - self._told_s >= PULSE_S:
                self._told_s = time.monotonic()
                self._tell()


class Moving(Staged):
    """A staged data file that is being written: each chunk that the disk is ready for is a beat."""

    def __init__(self, arena: Arena, size_bytes: int, serial: int, beat: Callable[[], None]) -> None:
        super().__init__(arena, size_bytes, serial)
        self._beat = beat

    def ready(self, end: int) -> bool:
        self._beat()
        return super().ready(end)
