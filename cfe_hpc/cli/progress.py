"""A bar on standard error while something takes its time, where somebody looks at it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["bar"]

Advance = Callable[[int], None]


@contextlib.contextmanager
def bar(title: str, total: int, *, quiet: bool, counts: bool = False) -> Iterator[Advance]:
    """A progress bar; what it gives is called with the bytes of each part that is done, from any thread.

    Args:
        counts: things are counted, and not bytes.
        quiet: show nothing; nothing is shown either where standard error is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield _ignore
        return
    # Imported here: it takes 50 ms, and most calls have nobody who looks.
    from rich import progress
    from rich.console import Console

    amount: list[progress.ProgressColumn] = [progress.MofNCompleteColumn()]
    if not counts:
        amount = [progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn()]
    columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *amount, progress.TimeRemainingColumn()]
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=total)
        yield lambda done: shown.advance(task, done)


def _ignore(done: int) -> None:
    del done
