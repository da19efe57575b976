"""Checkpoints that somebody asks for while a run trains."""

from __future__ import annotations

import time

from cfe_hpc.ranks.jobrecords import SAVE, records
from cfe_hpc.runfolder import RunFolder

__all__ = ["SaveRequests"]

_LOOK_EVERY_S = 1.0
"""The folder is on a shared filesystem, and steps may be short."""


class SaveRequests:
    """What was asked for since this object was made. Rank 0 alone looks."""

    def __init__(self, folder: RunFolder) -> None:
        self._control, self._seen = folder.control, len(records(folder, SAVE))
        self._looked_s = time.monotonic()

    def came(self) -> bool:
        """Whether another one has come; each is told once."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_EVERY_S:
            return False
        self._looked_s = now_s
        came = (self._control / (f"{SAVE}-{self._seen}" if self._seen else SAVE)).exists()
        self._seen += came
        return came
