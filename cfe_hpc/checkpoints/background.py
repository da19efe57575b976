"""Saving beside training: ranks copy their state into memory of their own, and a writer process each writes it out.

A save blocks training for the copy alone. The rest happens at later step boundaries, at each of which ranks tell each
other whether they are `busy`: when no writer is, rank 0's commits; when that is done, the checkpoint is durable. One
save is in flight at most, so that nothing is ever copied over what is still to be written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank, reason
from cfe_hpc.checkpoints.layout import Placement, place
from cfe_hpc.checkpoints.manifest import Identity, Manifest
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.checkpoints.rotation import Retention
from cfe_hpc.checkpoints.shard import header
from cfe_hpc.checkpoints.staging import Source
from cfe_hpc.checkpoints.store import CheckpointInfo, Content
from cfe_hpc.checkpoints.workers import Worker, WorkerLost
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint
from cfe_hpc.runfolder import utc_now
from cfe_hpc.units import format_size

__all__ = ["Background", "StagingError"]

_EXTENT_BYTES = 256
_SLACK_BYTES = 1 << 20
"""Estimates of what an index takes beside its names and its state; the latter may grow by a few digits, too."""


class StagingError(CheckpointError):
    """The state does not fit the memory allowed for staging, or a writer process could not be started."""


@dataclass(slots=True, kw_only=True)
class _Flight:
    """The save in flight.

    Attributes:
        problem: why this rank's part was never handed over; None when it was.
        manifest: set once all shards are written.
    """

    identity: Identity
    draft: Path
    layout: dict[str, Any]
    metrics: dict[str, float]
    began_s: float
    problem: str | None = None
    manifest: Manifest | None = None


@dataclass(slots=True, kw_only=True)
class Background:
    """The asynchronous saves of one attempt, as one rank takes part in them.

    Args:
        root: the checkpoints folder.
        policy: what stays.
        limit_bytes: memory that this rank may use for staging; None for as much as the state takes.
        protect: steps that stay in any case.
    """

    root: Path
    run_id: str
    attempt: int
    group: Group
    policy: Retention
    limit_bytes: int | None = None
    protect: list[int] = field(default_factory=list)
    _worker: Worker = field(default_factory=Worker, init=False)
    _flight: _Flight | None = field(default=None, init=False)

    @property
    def in_flight(self) -> int | None:
        """The step of the save in flight, the same on every rank; None without one."""
        return None if self._flight is None else self._flight.identity.step

    @property
    def writer_pid(self) -> int | None:
        """Process id of this rank's writer; None before the first and after the last."""
        return self._worker.pid

    def start(self) -> None:
        """Start the writers: it takes them a moment to be there. Collective.

        Raises:
            StagingError: a rank could not start its own; the same on every rank.
        """
        self._agreed(self._worker.start)

    def reserve(self, content: Content) -> None:
        """Get the memory that a save of `content` takes, ahead of it. Collective; without a save in flight.

        Raises:
            CheckpointError: a piece does not fit its dtype and shape; the same on every rank.
            StagingError: there is less memory than it takes; the same on every rank.
        """
        self._reserve(content)

    def begin(self, content: Content, *, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Copy the state; on return training may change it. Collective; without a save in flight.

        Raises:
            CheckpointError: nothing was begun; the same on every rank.
            StagingError: the same, for want of memory or writers.
        """
        assert self._flight is None
        began_s = monotonic()
        placement, needed_bytes = self._reserve(content)
        root, group = self.root, self.group
        token = first_rank(group, lambda: drafts.make_draft(root, step, self.attempt, needed_bytes)).decode()
        identity = Identity(run_id=self.run_id, step=step, attempt=self.attempt, world_size=group.size, token=token)
        flight = _Flight(
            identity=identity,
            draft=root / folders.draft_name(step, self.attempt, token),
            layout=content.layout,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            began_s=began_s,
        )
        try:
            self._hand_over(flight, placement, content)
        except Exception as error:  # told when all ranks meet again: the others have begun
            flight.problem = reason(error)
        self._flight = flight

    def busy(self) -> bool:
        """Whether this rank's writer has something to do still; to be agreed upon, then passed to `advance`."""
        return self._flight is not None and self._flight.problem is None and self._worker.busy()

    def advance(self, busy: bool) -> CheckpointInfo | None:
        """Do what is next for the save in flight, if its time has come. Collective.

        Args:
            busy: whether any rank is.

        Returns:
            The checkpoint, once it is durable and committed; its `seconds` are those from `begin` to then.

        Raises:
            CheckpointError: the save has failed, the same on every rank. The draft is removed as far as the
                filesystem lets it; older checkpoints are as they were.
        """
        flight = self._flight
        if flight is None or busy:
            return None
        try:
            if flight.manifest is None:
                self._commit(flight)
                return None
            return self._committed(flight, flight.manifest)
        except CheckpointError:
            self._flight = None
            if self.group.rank == 0:
                shutil.rmtree(flight.draft, ignore_errors=True)
            raise

    def finish(self) -> CheckpointInfo | None:
        """Wait for the save in flight, if there is one. Collective; returns and raises as `advance`."""
        done = None
        while self._flight is not None:
            if self._flight.problem is None:
                self._worker.wait()
            done = self.advance(busy=False)
        return done

    def close(self) -> None:
        """End this rank's writer, whatever it does, and give the memory back."""
        self._flight = None
        self._worker.close()

    def _reserve(self, content: Content) -> tuple[Placement, int]:
        """Where this rank's bytes go, the memory for them being there; and bytes of all ranks' parts on disk."""
        placements: list[Placement] = []

        def measure() -> bytes:
            placements.append(place([*content.pieces, *content.own]))
            state_bytes = len(json.dumps(content.state, allow_nan=False))
            return str(placements[0].size_bytes + state_bytes).encode()

        sizes = list(map(int, all_ranks(self.group, measure)))
        index_bytes = sum(len(extent.name) + _EXTENT_BYTES for extent in placements[0].extents)
        staged_bytes = sizes[self.group.rank] + index_bytes + _SLACK_BYTES
        self._agreed(lambda: self._fit(staged_bytes))
        return placements[0], sum(sizes)

    def _fit(self, size_bytes: int) -> bytes:
        if self.limit_bytes is not None and size_bytes > self.limit_bytes:
            raise CheckpointError(
                f"staging takes {format_size(size_bytes)}, checkpoint.staging_memory allows "
                f"{format_size(self.limit_bytes)}"
            )
        self._worker.arena.reserve(size_bytes)
        return self._worker.start()

    def _agreed(self, act: Callable[[], bytes]) -> None:
        try:
            all_ranks(self.group, act)
        except CheckpointError as error:
            raise StagingError(str(error)) from error

    def _hand_over(self, flight: _Flight, placement: Placement, content: Content) -> None:
        pieces = [*content.pieces, *content.own]
        rank = self.group.rank
        index = drafts.unwritten_index(
            flight.identity, rank, placement, num_shared=len(content.pieces), state=content.state
        ).seal()
        data_bytes = placement.size_bytes
        self._worker.arena.reserve(data_bytes + len(index))
        staged = self._worker.arena.view(data_bytes + len(index))
        source = Source(header(flight.identity, rank), placement, [piece.data for piece in pieces])
        source.copy(0, staged[:data_bytes])
        staged[data_bytes:] = index
        self._worker.ask(
            {
                "do": "write",
                "draft": str(flight.draft),
                "rank": rank,
                "data_bytes": data_bytes,
                "index_bytes": len(index),
            }
        )

    def _commit(self, flight: _Flight) -> None:
        """All writers have answered: have rank 0's commit."""

        def written() -> bytes:
            if flight.problem is not None:
                raise CheckpointError(flight.problem)
            return str(self._answer("facts")).encode()

        facts = all_ranks(self.group, written)
        flight.manifest = Manifest(
            identity=flight.identity,
            time=utc_now(),
            layout=flight.layout,
            metrics=flight.metrics,
            files=drafts.files(facts),
        )
        if self.group.rank != 0:
            return
        try:
            self._ask_commit(flight.draft, flight.manifest.seal())
        except Exception as error:
            flight.problem = reason(error)

    def _ask_commit(self, draft: Path, manifest: bytes) -> None:
        self._worker.arena.reserve(len(manifest))
        self._worker.arena.view(len(manifest))[:] = manifest
        self._worker.ask(
            {
                "do": "commit",
                "root": str(self.root),
                "draft": str(draft),
                "manifest_bytes": len(manifest),
                "policy": asdict(self.policy),
                "protect": self.protect,
            }
        )

    def _committed(self, flight: _Flight, manifest: Manifest) -> CheckpointInfo:
        path = self.root / folders.step_name(flight.identity.step)

        def durable() -> bytes:
            if flight.problem is not None:
                raise CheckpointError(flight.problem)
            try:
                return str(self._answer("durable_s") - flight.began_s).encode()
            except WorkerLost:
                # It was killed at some moment of the commit: what lies there tells which.
                folders.settle(flight.draft, path)
                if not _is_committed(path, flight.identity):
                    raise
                return str(monotonic() - flight.began_s).encode()

        seconds = float(first_rank(self.group, durable))
        self._flight = None
        return CheckpointInfo(
            path=path,
            step=flight.identity.step,
            size_bytes=manifest.size_bytes,
            seconds=seconds,
        )

    def _answer(self, key: str) -> Any:
        answer = self._worker.answer()
        if "failed" in answer:
            raise CheckpointError(answer["failed"])
        return answer[key]


def _is_committed(path: Path, identity: Identity) -> bool:
    try:
        return read_manifest(path).identity == identity
    except CorruptCheckpoint:
        return False
