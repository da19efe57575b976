"""A bar on standard error while bytes are read, where somebody looks at it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["bar"]

Advance = Callable[[int], None]


@contextlib.contextmanager
def bar(title: str, total_bytes: int, *, quiet: bool) -> Iterator[Advance]:
    """A progress bar; what it gives is called with the bytes of each part that is done, from any thread.

    Args:
        quiet: show nothing; nothing is shown either where standard error is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield _ignore
        return
    # Imported here: it takes 50 ms, and most calls have nobody who looks.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as shown:
        task = shown.add_task(title, total=total_bytes)
        yield lambda size_bytes: shown.advance(task, size_bytes)


def _ignore(size_bytes: int) -> None:
    del size_bytes
