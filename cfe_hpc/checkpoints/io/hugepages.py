"""Huge pages for the memory that saves are staged in: without them a disk takes its bytes more slowly, at more cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from cfe_hpc.checkpoints.io.memory import HUGE_BYTES, collapse

__all__ = ["HugePages"]

_SHARE = 0.2
"""Of one core, while there is something to do: about 10 s for each GB, once, beside training."""

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class HugePages:
    """Puts shared memory into huge pages, one at a time, on a thread of its own, while nothing else is done with it.

    Most kernels give shared memory none by themselves. What they do not give is done without.
    """

    def __init__(self) -> None:
        self._quiet = threading.Lock()
        self._thread: threading.Thread | None = None
        self._memory = memoryview(b"")

    def gather(self, memory: memoryview) -> None:
        """Begin with `memory`, which begins where a huge page may; what was asked before is left as it is by now."""
        self._memory = memory
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._gather, name="checkpoint-pages", daemon=True)
            self._thread.start()

    def held(self, act: Callable[[Asked], Answer]) -> Callable[[Asked], Answer]:
        """`act`, in whose time no page is moved."""

        def acting(request: Asked) -> Answer:
            with self._quiet:
                return act(request)

        return acting

    def _gather(self) -> None:
        memory, at = self._memory, 0
        while at + HUGE_BYTES <= len(memory):
            with self._quiet:
                began_s = time.monotonic()
                goes_on = collapse(memory[at : at + HUGE_BYTES])
                took_s = time.monotonic() - began_s
            if not goes_on:
                return
            time.sleep(took_s * (1 - _SHARE) / _SHARE)
            at += HUGE_BYTES
            if self._memory is not memory:
                memory, at = self._memory, 0
