"""What a run tracks, put back from the newest checkpoint that can be used, wherever it lies."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import store, tracked
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint
from cfe_hpc.ranks.bootstrap import Place
from cfe_hpc.ranks.journal import Journal
from cfe_hpc.ranks.tiering import Tiering
from cfe_hpc.recovery.origin import origin_of
from cfe_hpc.runfolder import RunFolder

__all__ = ["Restorer"]

logger = logging.getLogger(__name__)


class Restorer:
    """Restores of one attempt, as one rank takes part in them; each is collective."""

    def __init__(
        self,
        folder: RunFolder,
        spec: RunSpec,
        place: Place,
        journal: Journal,
        tiering: Tiering,
        objects: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        """
        Args:
            objects: what is tracked, by name; looked at anew each time, as are `facts`.
            facts: JSON that a checkpoint must share.
        """
        self._root, self._run_id, self._place, self._journal = folder.checkpoints, spec.run_id, place, journal
        self._tiering, self._objects, self._facts = tiering, objects, facts
        self._origin = origin_of(folder, spec)

    def begin(self) -> Opened | None:
        """At the start of an attempt; checkpoints that only nodes or the remote have are brought home first.

        Returns:
            The checkpoint, which may be the origin's; None when there is none yet.

        Raises:
            CheckpointMismatch: it is of another model or variant; nothing was changed.
            CorruptCheckpoint: there are checkpoints, and none verifies.
            CheckpointError: there is an origin, and it has no checkpoint.
        """
        try:
            brought = self._tiering.gather(self._skip)
            if brought is not None:
                self._brought(brought)
            opened = self._resume(self._elsewhere())
            return self._from_origin(self._origin) if opened is None and self._origin is not None else opened
        except CorruptCheckpoint as error:
            # Starting again at step 0 would rotate away what a person might still mend.
            remedy = f"mend or remove them, then `cfe-hpc requeue {self._run_id}`"
            raise CorruptCheckpoint(f"{error}; {remedy}") from error

    def back(self, below: int) -> Opened | None:
        """In the middle of an attempt, from the shared filesystem.

        Args:
            below: only checkpoints of fewer steps count.

        Returns and raises as `begin`.
        """
        return self._resume((), below)

    def _resume(self, elsewhere: Iterator[int] | tuple[()], below: int | None = None) -> Opened | None:
        return store.resume(
            self._root,
            self._load,
            run_id=self._run_id,
            attempt=self._place.facts.attempt,
            group=self._place.group,
            report=self._skip,
            places=self._tiering.places,
            elsewhere=elsewhere,
            below=below,
        )

    def _from_origin(self, origin: RunFolder) -> Opened:
        # Attempt 0 has none before it whose drafts it would clear away: they are the other run's.
        opened = store.resume(
            origin.checkpoints,
            self._load,
            run_id=origin.run_id,
            attempt=0,
            group=self._place.group,
            report=self._skip,
        )
        if opened is None:
            raise CheckpointError(
                f"checkpoint.resume_from: {origin.path} has no checkpoint; name another run, or take it out"
            )
        return opened

    def _elsewhere(self) -> Iterator[int]:
        """Steps that other tiers have, each on the shared filesystem once it is asked for. Collective."""
        for step in self._tiering.rescue(self._skip):
            self._brought(step)
            yield step

    def _brought(self, step: int) -> None:
        self._journal.event("checkpoint_saved", step=step, detail="brought from where it was complete")

    def _skip(self, path: Path, why: str) -> None:
        logger.warning("%s: not used: %s", path.name, why)
        self._journal.event("checkpoint_failed", reason="corrupt", detail=f"{path.name}: {why}")

    def _load(self, opened: Opened) -> None:
        place = self._place
        device = place.device.torch_device(place.facts.local_rank)
        tracked.restore(opened, self._objects, group=place.group, facts=self._facts, device=device)
