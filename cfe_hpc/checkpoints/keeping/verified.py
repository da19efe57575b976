"""What `verify` found of a checkpoint, remembered beside it as long as its files stay as they were."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cfe_hpc.checkpoints import marks
from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.errors import CorruptCheckpoint

__all__ = ["Outcome", "recall", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the last verification found.

    Attributes:
        time: when, RFC 3339.
        reason: why it cannot be used, in one line; None when every byte is as it was written.
    """

    time: str
    reason: str | None


def verify(folder: Path, run_id: str, progress: Callable[[int], None] | None = None) -> str | None:
    """Read every byte of a committed checkpoint, compare it with its checksum, and note the outcome where that can be.

    Args:
        progress: called with the bytes of each chunk that is good, from any thread.

    Returns:
        Why it cannot be used, in one line; None when it can.
    """
    before, reason = _state(folder), None
    try:
        Opened.at(folder, run_id).verify(progress)
    except CorruptCheckpoint as error:
        reason = str(error)
    with contextlib.suppress(OSError):  # another user's run
        marks.put(folder, "verified", reason=reason, files=before)
    return reason


def recall(folder: Path) -> Outcome | None:
    """The outcome of the last `verify`; None when there was none, or files have changed since."""
    facts = marks.read(folder, "verified")
    if not facts or facts.get("files") != _state(folder):
        return None
    return Outcome(time=str(facts.get("time")), reason=facts.get("reason"))


def _state(folder: Path) -> str:
    """A digest of every file's name, size, inode and time of its last change."""
    lines = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            facts = entry.stat(follow_symlinks=False)
            lines.append(f"{entry.name} {facts.st_size} {facts.st_ino} {facts.st_mtime_ns} {facts.st_ctime_ns}")
    return f"{crc32c(chr(10).join(sorted(lines)).encode()):08x}"
