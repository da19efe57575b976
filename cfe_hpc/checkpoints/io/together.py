"""Copying by several threads: each takes the next stretch when it has done its last, so that none waits for another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from cfe_hpc.checkpoints.io.memory import move

__all__ = ["Helper", "Stretches", "copy_together"]

Stretches = Sequence[tuple[memoryview, memoryview]]
"""(out, data), equally long, of each stretch that one thread copies at a time."""


class Helper(Protocol):
    """A thread that does what it is told."""

    def do(self, act: Callable[[], None]) -> threading.Event:
        """Have `act` done; what is returned is set when it is, or has raised."""


def copy_together(tasks: Sequence[Stretches], helpers: Sequence[Helper]) -> Iterator[int]:
    """Copy by this thread and `helpers`, in order as far as several can.

    Yields:
        How many of the tasks, from the first on, are done, again and again; all of them, at last.

    Raises:
        Exception: what a helper met.
    """
    line = _Line(tasks)
    wanted = helpers[: max(len(tasks) - 1, 0)]
    joined = [helper.do(partial(line.work, number)) for number, helper in enumerate(wanted, start=1)]
    try:
        for _ in line.steps(0):
            yield line.done()
    finally:
        line.close()
        for each in joined:
            each.wait()
    if line.error is not None:
        raise line.error
    yield len(tasks)


class _Line:
    """What is still to be copied, and what is being copied by whom."""

    def __init__(self, tasks: Sequence[Stretches]) -> None:
        self._tasks, self._lock = tasks, threading.Lock()
        self._next = 0
        self._at: dict[int, int] = {}
        self.error: Exception | None = None

    def steps(self, number: int) -> Iterator[None]:
        """Copy one task at each step, as the thread of that number, until none is left."""
        while True:
            with self._lock:
                if self._next >= len(self._tasks):
                    return
                at = self._at[number] = self._next
                self._next += 1
            for out, data in self._tasks[at]:
                move(out, data)
            with self._lock:
                del self._at[number]
            yield

    def work(self, number: int) -> None:
        """All of `steps`, for a helper."""
        try:
            for _ in self.steps(number):
                pass
        except Exception as error:  # its task stays undone, and so does what `done` tells
            self.error = error

    def done(self) -> int:
        """Tasks, from the first on, that are done."""
        with self._lock:
            return min(self._at.values(), default=self._next)

    def close(self) -> None:
        """Begin no further task."""
        with self._lock:
            self._next = len(self._tasks)
