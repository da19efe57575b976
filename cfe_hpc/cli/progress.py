"""A bar on standard error while something takes its time, where somebody looks at it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["bar", "stages"]

Advance = Callable[[int], None]
Told = Callable[[str, int, int], None]

_AFTER_S = 1.0
"""What is done by then needs no bar."""


@contextlib.contextmanager
def bar(title: str, total: int, *, quiet: bool, counts: bool = False) -> Iterator[Advance]:
    """A progress bar; what it gives is called with the bytes of each part that is done, from any thread.

    It appears when the work has taken a second.

    Args:
        counts: things are counted, and not bytes.
        quiet: show nothing; nothing is shown either where standard error is no terminal.
    """
    sum_lock, done = threading.Lock(), 0
    with stages(quiet=quiet, counts=counts) as told:

        def advance(part: int) -> None:
            nonlocal done
            with sum_lock:
                done += part
                told(title, done, total)

        yield advance


@contextlib.contextmanager
def stages(*, quiet: bool, counts: bool = False) -> Iterator[Told]:
    """A bar for each stage of a work; what it gives is called with the stage's name, what is done of it and its whole.

    Args: as `bar`.
    """
    if quiet or not sys.stderr.isatty():
        yield _ignore
        return
    bars = _Bars(counts=counts)
    try:
        yield bars.tell
    finally:
        bars.close()


class _Bars:
    """The bar of the stage at hand. Any thread may tell of it."""

    def __init__(self, *, counts: bool) -> None:
        self._counts, self._lock, self._began_s = counts, threading.Lock(), time.monotonic()
        self._shown: Any = None
        self._stage: str | None = None
        self._task: Any = None

    def tell(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            if self._shown is None:
                if time.monotonic() - self._began_s < _AFTER_S:
                    return
                self._shown = _progress(counts=self._counts)
                self._shown.start()
            if stage != self._stage:
                if self._task is not None:
                    self._shown.remove_task(self._task)
                self._stage, self._task = stage, self._shown.add_task(stage, total=total)
            self._shown.update(self._task, completed=done, total=total)

    def close(self) -> None:
        if self._shown is not None:
            self._shown.stop()


def _progress(*, counts: bool) -> Any:
    # Imported here: it takes 50 ms, and most calls have nobody who looks.
    from rich import progress
    from rich.console import Console

    amount: list[progress.ProgressColumn] = [progress.MofNCompleteColumn()]
    if not counts:
        amount = [progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn()]
    columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *amount, progress.TimeRemainingColumn()]
    return progress.Progress(*columns, console=Console(stderr=True), transient=True)


def _ignore(stage: str, done: int, total: int) -> None:
    del stage, done, total
