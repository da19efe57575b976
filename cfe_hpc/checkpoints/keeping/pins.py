"""Pinning: a person's word that a checkpoint stays."""

from __future__ import annotations

import time
from pathlib import Path

from cfe_hpc.checkpoints import marks
from cfe_hpc.checkpoints.keeping.rotation import glance
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint

__all__ = ["pin", "unpin"]

_PATIENCE_S = 2.0


def pin(folder: Path, run_id: str, note: str | None = None) -> None:
    """Keep a checkpoint from rotation and pruning, now and when its step is saved again.

    The mark comes first, the look at the checkpoint second: a run that rotates at this moment either finds the mark
    and puts the checkpoint back, or has it gone before the look. See folders.take_out.

    Raises:
        CheckpointError: it is gone, or not whole; there is no mark then.
        OSError: it cannot be marked.
    """
    marks.put(folder, "pinned", note=note)
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            glance(folder, run_id)
            return
        except CorruptCheckpoint as error:
            there = folder.exists()
            if there or time.monotonic() > deadline_s:
                marks.remove(folder, "pinned")
                what = f"cannot be used: {error}" if there else "has just been rotated away"
                raise CheckpointError(f"{folder.name}: not pinned: it {what}") from error
            time.sleep(0.05)


def unpin(folder: Path) -> bool:
    """Leave a checkpoint to the job's policy again, that of an epoch's end, too; whether it was marked.

    Raises:
        OSError: the mark cannot be taken off.
    """
    return any([marks.remove(folder, mark) for mark in marks.KEEPING])
