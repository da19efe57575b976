"""The checkpoint side of a Run: what is tracked, when it is saved, and what it is restored from."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import store, tracked
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.rotation import rotate
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint, UsageError
from cfe_hpc.ranks.bootstrap import Place
from cfe_hpc.ranks.journal import Journal
from cfe_hpc.ranks.weights import weights_sha256
from cfe_hpc.runfolder import RunFolder

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)


class Keeper:
    """Saves and restores what a run tracks. `save` and `restore` are collective."""

    def __init__(self, folder: RunFolder, spec: RunSpec, place: Place, journal: Journal) -> None:
        self._root, self._run_id = folder.checkpoints, spec.run_id
        self._policy, self._place, self._journal = spec.job.checkpoint, place, journal
        self._objects: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._sealed = False
        self._saved_step: int | None = None
        self._resumed_step: int | None = None
        self._saved_s = time.monotonic()

    def track(self, objects: Mapping[str, Any]) -> None:
        """See Run.track."""
        if self._sealed:
            raise UsageError("track(): the loop has begun; track everything before run.steps()")
        for name, thing in objects.items():
            if name in self._objects:
                raise UsageError(f"track(): {name} is tracked already; give each object a name of its own")
            if not tracked.is_trackable(thing):
                kind = type(thing).__name__
                raise UsageError(f"track(): {name} ({kind}) has no state_dict and load_state_dict; give it both")
            self._objects[name] = thing

    def expect(self, facts: Mapping[str, Any]) -> None:
        """See Run.expect."""
        self._facts.update(facts)

    def restore(self) -> int:
        """Restore everything tracked from the newest checkpoint that verifies.

        Returns:
            Steps done at that checkpoint; 0 when there is none yet.

        Raises:
            CheckpointMismatch: it is of another model or variant; nothing was changed.
            CorruptCheckpoint: there are checkpoints, and none verifies.
        """
        self._sealed = True
        started_s = time.monotonic()
        try:
            opened = store.newest(
                self._root,
                run_id=self._run_id,
                attempt=self._place.facts.attempt,
                group=self._place.group,
                report=self._skip,
            )
        except CorruptCheckpoint as error:
            # Starting again at step 0 would rotate away what a person might still mend.
            remedy = f"mend or remove them, then `cfe-hpc requeue {self._run_id}`"
            raise CorruptCheckpoint(f"{error}; {remedy}") from error
        if opened is None:
            self._saved_s = time.monotonic()
            return 0
        self._load(opened)
        self._saved_step = self._resumed_step = opened.step
        self._saved_s = time.monotonic()
        self._journal.event("resumed", step=opened.step, seconds=round(self._saved_s - started_s, 3))
        return opened.step

    def _skip(self, path: Path, why: str) -> None:
        logger.warning("%s: not used: %s", path.name, why)
        self._journal.event("checkpoint_failed", reason="corrupt", detail=f"{path.name}: {why}")

    def _load(self, opened: Opened) -> None:
        tracked.restore(
            opened,
            self._objects,
            group=self._place.group,
            facts=self._facts,
            device=self._place.device.torch_device(self._place.facts.local_rank),
        )

    def due_by_step(self, done: int) -> bool:
        """Whether the schedule counted in steps asks for a save now."""
        return self._policy.every_steps is not None and done % self._policy.every_steps == 0

    def due_by_time(self) -> bool:
        """Whether the schedule in time asks for a save now, by this rank's clock."""
        return self._policy.every is not None and time.monotonic() - self._saved_s >= self._policy.every

    def save(self, done: int) -> bool:
        """Save the state after `done` steps, unless that is saved already, and rotate old checkpoints away.

        A save that fails is an event and a warning; training goes on from what it has.

        Returns:
            Whether a checkpoint of this very step is committed.
        """
        if self._saved_step == done:
            return True
        group, metrics = self._place.group, self._journal.take_metrics()
        try:
            info = store.save(
                self._root,
                tracked.capture(self._objects, group=group, facts=self._facts),
                step=done,
                attempt=self._place.facts.attempt,
                run_id=self._run_id,
                group=group,
                metrics=metrics,
            )
        except CheckpointError as error:
            self._saved_s = time.monotonic()  # a full disk must not be tried again at every step
            logger.warning("checkpoint of step %d failed: %s", done, error)
            self._journal.event("checkpoint_failed", step=done, reason="save", detail=str(error))
            return False
        self._saved_step, self._saved_s = done, time.monotonic()
        figures = {"checkpoint_seconds": info.seconds, "checkpoint_bytes": float(info.size_bytes)}
        self._journal.publish(figures, step=done)
        self._journal.event("checkpoint_saved", step=done, seconds=round(info.seconds, 3), detail=info.path.name)
        if group.rank == 0:
            rotate(self._root, self._policy, protect={self._resumed_step} if self._resumed_step is not None else set())
        return True

    def weights_sha256(self) -> str | None:
        """The digest of everything tracked that holds weights; see ranks.weights. Collective."""
        return weights_sha256(self._objects, self._place.group)
