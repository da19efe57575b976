"""Standard output and error of a process that is to become a rank, or a launcher of ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["redirect"]


def redirect(stem: Path) -> None:
    """Append this process's standard output to `<stem>.out` from now on, and its standard error to `<stem>.err`."""
    for stream, ending in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        fd = os.open(f"{stem}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, stream.fileno())
        os.close(fd)
