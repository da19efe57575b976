"""One attempt at a time: an attempt that another one has followed must stop writing into the run folder.

A slurmd that dies alone leaves its ranks training, while Slurm takes the node for dead and starts the next attempt.
"""

from __future__ import annotations

import os
import re

from cfe_hpc.runfolder import RunFolder

__all__ = ["begin", "superseded"]

_BEGUN = re.compile(r"attempt-(\d+)")


def begin(folder: RunFolder, attempt: int) -> None:
    """Say that an attempt has begun: earlier ones that still run end themselves. One process of it calls this."""
    folder.note(f"attempt-{attempt}", f"attempt {attempt} has begun")


def superseded(folder: RunFolder, attempt: int) -> int | None:
    """The newest attempt that has begun after this one; None when there is none, or the folder cannot be listed."""
    try:
        # By listing: NFS clients go on believing for a minute that a name they asked for is not there.
        names = os.listdir(folder.control)
    except OSError:
        return None
    begun = [int(match[1]) for name in names if (match := _BEGUN.fullmatch(name))]
    newest = max(begun, default=attempt)
    return newest if newest > attempt else None
