"""The checkpoint side of a Run: what is tracked, when it is saved, and what it is restored from."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cfe_hpc.checkpoints import store, tracked
from cfe_hpc.checkpoints.beside.background import Background
from cfe_hpc.checkpoints.keeping.rotation import Retention, Rotation
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CheckpointError, StagingError, UsageError
from cfe_hpc.ranks.bootstrap import Place
from cfe_hpc.ranks.hooks import before_any_step
from cfe_hpc.ranks.journal import Journal
from cfe_hpc.ranks.restorer import Restorer
from cfe_hpc.ranks.room import Room, mark_epoch, take_out
from cfe_hpc.ranks.saverequests import SaveRequests
from cfe_hpc.ranks.tiering import Tiering
from cfe_hpc.ranks.weights import weights_sha256
from cfe_hpc.runfolder import RunFolder

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)


class Keeper:
    """Saves and restores what a run tracks; every method that saves or restores is collective.

    With `checkpoint.async` a save that comes due is begun at its boundary and goes on at later ones; without, it is
    done at once.

    Attributes:
        objects: what is tracked, by name.
        saved_step: of the newest checkpoint of the run's, that it was resumed from included; None without one.
    """

    def __init__(self, folder: RunFolder, spec: RunSpec, place: Place, journal: Journal) -> None:
        self._root, self._run_id = folder.checkpoints, spec.run_id
        self._policy, self._place, self._journal = spec.job.checkpoint, place, journal
        self._retention = Retention(
            keep_last=self._policy.keep_last,
            keep_every_steps=self._policy.keep_every_steps,
            keep_best=self._policy.keep_best,
        )
        self._rotation = Rotation(self._root, self._retention)
        self._room = Room(self._root, self._retention, place.group, journal, self._protected)
        self._tiering = Tiering(folder.checkpoints, spec, place, self._degraded)
        self._requests = SaveRequests(folder) if place.group.rank == 0 else None
        self.objects: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._restorer = Restorer(folder, spec, place, journal, self._tiering, self.objects, self._facts)
        self._capturing = tracked.Capturing(self.objects, group=place.group, facts=self._facts)
        self._sealed = False
        self.saved_step: int | None = None
        self._resumed_step: int | None = None
        self._saved_s = time.monotonic()
        self._background: Background | None = None
        self._reserved = False
        self._late = False
        self._epoch: int | None = None
        self._unhook: Callable[[], None] | None = None
        self._blocked_seconds = 0.0

    def track(self, objects: Mapping[str, Any]) -> None:
        """See Run.track."""
        if self._sealed:
            raise UsageError("track(): the loop has begun; track everything before run.steps()")
        for name, thing in objects.items():
            if name in self.objects:
                raise UsageError(f"track(): {name} is tracked already; give each object a name of its own")
            if not tracked.is_trackable(thing):
                kind = type(thing).__name__
                raise UsageError(f"track(): {name} ({kind}) has no state_dict and load_state_dict; give it both")
            self.objects[name] = thing

    def expect(self, facts: Mapping[str, Any]) -> None:
        """See Run.expect."""
        self._facts.update(facts)

    def restore(self, imported_step: int = 0) -> int:
        """Restore everything tracked from the newest checkpoint that verifies, wherever it lies.

        Args:
            imported_step: where a run without a checkpoint begins; what is tracked is as the script has loaded it.

        Returns:
            Steps done at that checkpoint; `imported_step` when there is none yet.

        Raises:
            CheckpointMismatch: it is of another model or variant; nothing was changed.
            CorruptCheckpoint: there are checkpoints, and none verifies.
        """
        self._sealed = True
        started_s = time.monotonic()
        opened = self._restorer.begin()
        own = opened if opened is not None and opened.manifest.identity.run_id == self._run_id else None
        if opened is not None:
            seconds, detail = round(time.monotonic() - started_s, 3), None if own else f"from {opened.folder}"
            self._journal.event("resumed", step=opened.step, seconds=seconds, detail=detail)
        if own is not None:
            self.saved_step = self._resumed_step = own.step
            self._tiering.resumed(own)
        elif opened is None and imported_step:
            self._journal.event("resumed", step=imported_step, detail="imported by the script")
        if self._place.group.rank == 0:
            self._rotation.prepare()
        if self._policy.async_:
            self._start_background(None if own is None else own.manifest.identity)
        self._saved_s = time.monotonic()
        return imported_step if opened is None else opened.step

    def go_back(self, below: int) -> int | None:
        """Put back the newest checkpoint of fewer than `below` steps, and take out those of more. Collective.

        A save in flight is waited for first.

        Returns:
            Its steps; None when there is none: nothing was changed then.

        Raises:
            CorruptCheckpoint: there are such checkpoints, and none verifies.
        """
        self._finish_in_flight()
        background = self._background
        if background is not None and background.drain is not None:
            self._tiering.arrive(background, self._settle)
        opened = self._restorer.back(below)
        if opened is None:
            return None
        self._tiering.forget(below)
        if self._place.group.rank == 0:
            take_out(self._root, below, self._journal)
        self.saved_step = self._resumed_step = opened.step
        self._late, self._epoch = False, None
        self._journal.take_metrics()
        if background is not None:
            background.on_nodes = None
            background.protect[:] = sorted(self._protected())
        self._saved_s = time.monotonic()
        return opened.step

    def due_by_time(self) -> bool:
        """Whether the schedule in time asks for a save now, by this rank's clock, or somebody does."""
        wanted_s = (self._policy.every, self._journal.save_every_s)
        every_s = min((each for each in wanted_s if each is not None), default=None)
        asked = self._requests is not None and self._requests.came()
        return asked or (every_s is not None and time.monotonic() - self._saved_s >= every_s)

    def is_due(self, done: int) -> bool:
        """Whether `boundary` has something to do after `done` steps, whatever the time; the same on every rank."""
        return self._is_due(done) or (self._background is not None and not self._reserved)

    def _is_due(self, done: int) -> bool:
        by_step = self._policy.every_steps is not None and done % self._policy.every_steps == 0
        return by_step or self._late or self._epoch is not None

    def busy(self) -> list[int]:
        """Whether this rank's part of a save is still being written, and whether one is still on its way from the
        nodes: 0 or 1 each, to be agreed on for `advance`."""
        background = self._background
        if background is None:
            return [0, 0]
        return [int(background.busy()), int(background.drain is not None and background.drain.busy())]

    def advance(self, busy: Sequence[int]) -> None:
        """Let saves take their next step, as far as it is time.

        Args:
            busy: `busy`, of any rank; the same on every rank.
        """
        background = self._background
        if background is not None:
            drain = background.drain
            if drain is not None and drain.step is not None:
                self._settle(drain.step, partial(drain.advance, self._place.group, bool(busy[1])))
            if background.in_flight is not None:
                self._settle(background.in_flight, partial(background.advance, bool(busy[0])))
        self._tiering.advance()

    def boundary(self, done: int, *, due_by_time: bool) -> None:
        """Begin the save that is due after `done` steps, if one is: see `is_due`."""
        if self._epoch is not None:  # this very step is meant, not the first that has time
            self._finish_in_flight(wholly=True)
            self._mark_epoch(done)
            self.begin(done)
        elif due_by_time or self._is_due(done):
            self.begin(done)
        elif self._background is not None and not self._reserved:
            self._reserve(self._background)

    def begin(self, done: int) -> None:
        """Save the state after `done` steps, beside training if the job asks for that.

        While another save is in flight nothing is begun: this one's place is the first boundary after it.
        """
        in_flight = None if self._background is None else self._background.in_flight
        on_nodes = None if self._background is None else self._background.on_nodes
        if done in (self.saved_step, in_flight, on_nodes):
            return
        if self._background is None:
            self._save(done)
        elif in_flight is None:
            self._late = False
            self._begin(self._background, done)
        elif not self._late:
            self._late = True
            detail = f"the checkpoint of step {in_flight} is still being written"
            logger.warning("checkpoint of step %d waits: %s", done, detail)
            self._journal.event("degraded", step=done, reason="checkpoint_late", detail=detail)

    def save(self, done: int, time_left_s: Callable[[], float | None] = lambda: None) -> bool:
        """Save the state after `done` steps, unless that is saved already; durable on return.

        A save in flight is waited for first. One that fails is an event and a warning; training goes on from what
        it has. With a node-local tier it is complete on the nodes first, and goes on from there as far as time allows.

        Args:
            time_left_s: rank 0's: seconds until this attempt is killed; None when it is not known to be.

        Returns:
            Whether a checkpoint of this very step is committed, or complete on the nodes when time was up.
        """
        self._finish_in_flight()
        self._mark_epoch(done)
        background = self._background
        if self.saved_step == done or background is None or background.drain is None:
            return self.saved_step == done or self._save(done)
        group = self._place.group
        hurried = bool(group.all_max([int(group.rank == 0 and time_left_s() is not None)])[0])
        if background.on_nodes != done:
            # What is on its way must not take the time of the one that is to be resumed from.
            if hurried:
                self._tiering.make_way(background, self._settle)
            else:
                self._tiering.arrive(background, self._settle, time_left_s)
            self._begin(background, done)
            self._finish_in_flight()
        if self._background is background and self.saved_step != done:
            self._tiering.arrive(background, self._settle, time_left_s)
        return self.saved_step == done or (hurried and background.on_nodes == done) or self._save(done)

    def end_epoch(self, number: int) -> None:
        """See Run.end_epoch."""
        if self._policy.keep_epochs or self._policy.export_epochs is not None:
            self._epoch = number

    def _finish_in_flight(self, *, wholly: bool = False) -> None:
        background = self._background
        if background is not None and background.in_flight is not None:
            self._settle(background.in_flight, background.finish)
            if wholly and background.in_flight is not None:  # it waits on the nodes for the one before it
                self._tiering.arrive(background, self._settle)

    def _mark_epoch(self, done: int) -> None:
        """Keep the checkpoint of `done` steps for the epoch that ended there: before rotation can see it."""
        epoch, self._epoch = self._epoch, None
        if epoch is not None and self._place.group.rank == 0:
            mark_epoch(self._root, done, epoch)

    def close(self) -> None:
        """End what writes beside training: this rank saves no more. Not collective."""
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._unhook is not None:
            self._unhook()
            self._unhook = None

    def tidy(self, timeout_s: float) -> None:
        """Have the last checkpoint at the remote, and deleted what rotation took out: nobody comes after a run that has
        completed. Not collective."""
        self._tiering.finish()
        if self._place.group.rank == 0 and not self._rotation.finish(timeout_s):
            logger.warning("deleted checkpoints still take space in %s; `checkpoints prune` frees it", self._root)

    def _save(self, done: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Write the checkpoint from this very process, and rotate old ones away."""
        group = self._place.group
        metrics = self._journal.take_metrics() if metrics is None else metrics
        self._journal.leave_to_successor()
        try:
            info = store.save(
                self._root,
                self._capturing.take(),
                step=done,
                attempt=self._place.facts.attempt,
                run_id=self._run_id,
                group=group,
                metrics=metrics,
            )
        except CheckpointError as error:
            return self._failed(done, error) and self._save(done, metrics)
        self._saved(info, blocked_seconds=info.seconds)
        self._saved_s = time.monotonic()
        if group.rank == 0:
            self._rotation.rotate(protect=self._protected())
        return True

    def _failed(self, step: int, error: CheckpointError) -> bool:
        """Tell of a save that failed; whether to try once more. Collective."""
        self._saved_s = time.monotonic()  # a full disk must not be tried again at every step
        return self._room.failed(step, error)

    def _saved(self, info: store.CheckpointInfo, blocked_seconds: float) -> None:
        self.saved_step = info.step
        self._room.saved()
        figures = {"checkpoint_seconds": blocked_seconds, "checkpoint_bytes": float(info.size_bytes)}
        self._journal.publish(figures, step=info.step)
        self._journal.saved(info.step, seconds=info.seconds, blocked_seconds=blocked_seconds, name=info.path.name)
        self._tiering.offer(info.step)
        if self._background is not None:
            self._background.protect[:] = sorted(self._protected())

    def _protected(self) -> set[int]:
        return self._tiering.needed | ({self._resumed_step} if self._resumed_step is not None else set())

    def _degraded(self, word: str, detail: str) -> None:
        """Tell that checkpoints go on, but not as asked for."""
        logger.warning("%s: %s", word, detail)
        self._journal.event("degraded", reason=word, detail=detail)

    def _start_background(self, resumed: Identity | None) -> None:
        background = Background(
            root=self._root,
            run_id=self._run_id,
            attempt=self._place.facts.attempt,
            group=self._place.group,
            limit_bytes=self._policy.staging_memory,
            policy=self._retention,
            protect=sorted(self._protected()),
            address=self._place.meeting.address,
            overlap=self._policy.overlap,
            tier=self._tiering.node,
            degraded=self._degraded,
            copies=self._place.device.copies(),
            ranks_here=self._place.facts.local_world_size,
        )
        self._background = background
        if self._policy.overlap and "torch" in sys.modules:
            self._unhook = before_any_step(background.settle)
        try:
            background.start()
        except StagingError as error:
            self._give_up(error)
            return
        if background.drain is not None:
            background.drain.keep(durable=resumed, sweep=True)

    def _reserve(self, background: Background) -> None:
        """Have the memory before the first save, but after a step: only then have optimizers all of their state."""
        self._reserved = True
        try:
            background.reserve(self._capturing.take())
        except StagingError as error:
            self._give_up(error)
        except CheckpointError as error:
            logger.warning("checkpoints will fail: %s", error)

    def _begin(self, background: Background, done: int) -> None:
        began_s, metrics = time.monotonic(), self._journal.take_metrics()
        self._reserved = True
        self._journal.leave_to_successor()
        try:
            background.begin(self._capturing.take(background.is_ready), step=done, metrics=metrics)
        except StagingError as error:
            self._give_up(error)
            self._save(done, metrics)
        except CheckpointError as error:
            self._late = self._failed(done, error) or self._late
        self._saved_s = time.monotonic()
        self._blocked_seconds = self._saved_s - began_s

    def _give_up(self, error: StagingError) -> None:
        """Save while training waits, from now on."""
        logger.warning("checkpoints are written while training waits: %s", error)
        self._journal.event("degraded", reason="checkpoint_staging", detail=str(error))
        self.close()

    def _settle(self, step: int, act: Callable[[], store.CheckpointInfo | None]) -> None:
        """`act` on the save of `step`, and tell what became of it."""
        try:
            info = act()
        except CheckpointError as error:
            self._late = self._failed(step, error) or self._late
            return
        if info is not None:
            self._saved(info, blocked_seconds=self._blocked_seconds)

    def weights_sha256(self) -> str | None:
        """The digest of everything tracked that holds weights; see ranks.weights. Collective."""
        return weights_sha256(self.objects, self._place.group)
