"""Saves that fail, room for them on a full disk, and single checkpoints that stay or go."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from cfe_hpc.checkpoints import folders, marks
from cfe_hpc.checkpoints.agree import first_rank
from cfe_hpc.checkpoints.keeping.rotation import Retention, rotate
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.errors import CheckpointError, DiskFull
from cfe_hpc.ranks.journal import Journal

__all__ = ["Room", "mark_epoch", "take_out"]

logger = logging.getLogger(__name__)


class Room:
    """Tells of saves that failed, and makes room once for one that found none."""

    def __init__(
        self,
        root: Path,
        retention: Retention,
        group: Group,
        journal: Journal,
        protected: Callable[[], Collection[int]],
    ) -> None:
        """
        Args:
            root: the checkpoints folder.
            retention: what stays while there is room.
            protected: asked on rank 0 for steps that stay in any case.
        """
        self._root, self._group, self._journal, self._protected = root, group, journal, protected
        # A disk that holds fewer than keep_last would take none any more.
        self._least = replace(retention, keep_last=1)
        self._tried_again = False

    def failed(self, step: int, error: CheckpointError) -> bool:
        """Tell of a save that failed, the same on every rank; whether there is room now to try once more. Collective.

        On a full disk, older checkpoints that only `keep_last` keeps make room for it; the newest always stays.
        """
        freed: list[int] = []
        if isinstance(error, DiskFull) and not self._tried_again:
            with contextlib.suppress(CheckpointError):  # the folder cannot be listed: nothing is freed
                freed = json.loads(first_rank(self._group, lambda: json.dumps(self._make()).encode()))
        self._tried_again = bool(freed)
        if freed:
            detail = f"{error}; deleted step {', '.join(map(str, freed))}, trying once more"
            logger.warning("checkpoint of step %d: %s", step, detail)
            self._journal.event("degraded", step=step, reason="checkpoint_disk_full", detail=detail)
        else:
            logger.warning("checkpoint of step %d failed: %s", step, error)
            self._journal.event("checkpoint_failed", step=step, reason="save", detail=str(error))
        return bool(freed)

    def _make(self) -> list[int]:
        return rotate(self._root, self._least, protect=self._protected())

    def saved(self) -> None:
        """A save went well: the next full disk is another one."""
        self._tried_again = False


def mark_epoch(root: Path, step: int, epoch: int) -> None:
    """Have rotation keep the checkpoint of this step, which is still to be made, for the epoch that ended there.
    Rank 0 calls it. A mark that cannot be made is a warning."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        marks.put(root / folders.step_name(step), "epoch", epoch=epoch)
    except OSError as error:
        logger.warning("the checkpoint of epoch %d will not be kept: %s", epoch, error.strerror)


def take_out(root: Path, steps_from: int, journal: Journal) -> None:
    """Delete the checkpoints of `steps_from` steps and more, which lead to a value that is not finite, and tell so.
    Rank 0 calls it. Pinned ones stay; failures are logged."""
    for step, folder in folders.committed(root):
        if step >= steps_from and folders.take_out(folder):
            journal.event("checkpoint_failed", step=step, reason="nan", detail=f"{folder.name} is taken out")
