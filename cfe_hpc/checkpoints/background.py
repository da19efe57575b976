"""Saving beside training: ranks copy their state into memory of their own, and a writer process each writes it out.

A save blocks training for the copy alone, or, with `overlap`, not even for that: what only an optimizer's step
changes is copied while the next forward and backward go on, and awaited before that step. The writers commit among
themselves. At step boundaries ranks tell each other whether they are `busy`; when none is, the checkpoint is durable,
or has failed on all of them. One save is in flight at most, so that nothing is ever copied over what is still to be
written.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank, raised, reason
from cfe_hpc.checkpoints.layout import Placement, place
from cfe_hpc.checkpoints.links import SECRET_BYTES
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.checkpoints.rotation import Retention
from cfe_hpc.checkpoints.shard import header
from cfe_hpc.checkpoints.staging import Source, copy_threads
from cfe_hpc.checkpoints.store import CheckpointInfo, Content
from cfe_hpc.checkpoints.workers import Worker, WorkerLost
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint, StagingError
from cfe_hpc.units import format_size

__all__ = ["Background"]

_EXTENT_BYTES = 256
_SLACK_BYTES = 1 << 20
"""Estimates of what an index takes beside its names and its state; the latter may grow by a few digits, too."""


@dataclass(slots=True, kw_only=True)
class _Flight:
    """The save in flight.

    Attributes:
        needed_bytes: of all ranks' files, nearly.
        handing: the thread that completes this rank's copy and asks its writer to write it.
        problem: why this rank's part was never handed over; None while it may yet be, or was.
        torn: whether that is because the state changed while it was copied.
    """

    identity: Identity
    draft: Path
    needed_bytes: int
    metrics: dict[str, float]
    began_s: float
    handing: threading.Thread | None = None
    problem: str | None = None
    torn: bool = False


@dataclass(slots=True, kw_only=True)
class Background:
    """The asynchronous saves of one attempt, as one rank takes part in them.

    Args:
        root: the checkpoints folder.
        policy: what stays.
        limit_bytes: memory that this rank may use for staging; None for as much as the state takes.
        protect: steps that stay in any case.
        address: what the other ranks' nodes reach rank 0's by.
        overlap: copy steady pieces while training goes on; then `settle` must be called before they change.
    """

    root: Path
    run_id: str
    attempt: int
    group: Group
    policy: Retention
    limit_bytes: int | None = None
    protect: list[int] = field(default_factory=list)
    address: str = "127.0.0.1"
    overlap: bool = False
    _worker: Worker = field(default_factory=Worker, init=False)
    _flight: _Flight | None = field(default=None, init=False)
    _met: bool = field(default=False, init=False)
    _secret: str = field(default_factory=lambda: secrets.token_hex(SECRET_BYTES), init=False)

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
        all_ranks(self.group, self._start)

    def reserve(self, content: Content) -> None:
        """Get the memory that a save of `content` takes, ahead of it. Collective; without a save in flight.

        Raises:
            CheckpointError: a piece does not fit its dtype and shape; the same on every rank.
            StagingError: there is less memory than it takes; the same on every rank.
        """
        self._prepare(content)

    def begin(self, content: Content, *, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Copy the state; on return training may change it, but for steady pieces with `overlap`: see `settle`.

        Collective; without a save in flight.

        Raises:
            CheckpointError: nothing was begun; the same on every rank.
            StagingError: the same, for want of memory or writers.
        """
        assert self._flight is None
        began_s = monotonic()
        placement, needed_bytes, token = self._prepare(content)
        identity = Identity(
            run_id=self.run_id, step=step, attempt=self.attempt, world_size=self.group.size, token=token
        )
        flight = _Flight(
            identity=identity,
            draft=self.root / folders.draft_name(step, self.attempt, token),
            needed_bytes=needed_bytes,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            began_s=began_s,
        )
        try:
            self._copy(flight, placement, content)
        except Exception as error:  # told when all ranks meet again: the others have begun
            self._give_up(flight, reason(error))
        self._flight = flight

    def settle(self) -> None:
        """Wait until this rank's state is copied: it may change from then on. Not collective."""
        if self._flight is not None and self._flight.handing is not None:
            self._flight.handing.join()

    def busy(self) -> bool:
        """Whether this rank's writer has something to do still; to be agreed upon, then passed to `advance`."""
        flight = self._flight
        if flight is None or flight.handing is None:
            return False
        return flight.handing.is_alive() or (flight.problem is None and self._worker.busy())

    def advance(self, busy: bool) -> CheckpointInfo | None:
        """Take note of the save in flight, if it has come to its end. Collective.

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
        self._flight = None
        try:
            return self._outcome(flight)
        except CheckpointError:
            self.overlap = self.overlap and not self.group.all_max([int(flight.torn)])[0]
            if self.group.rank == 0:
                shutil.rmtree(flight.draft, ignore_errors=True)
            raise

    def finish(self) -> CheckpointInfo | None:
        """Wait for the save in flight, if there is one. Collective; returns and raises as `advance`."""
        self.settle()
        if self._flight is not None and self._flight.problem is None:
            self._worker.wait()
        return self.advance(busy=False)

    def close(self) -> None:
        """End this rank's writer, whatever it does, and give the memory back."""
        self.settle()
        self._flight = None
        self._worker.close()

    def _start(self) -> bytes:
        """Start this rank's writer; something where it is a new one."""
        try:
            if self._worker.start():
                self._met = False
            return b"" if self._met else b"new"
        except OSError as error:
            raise StagingError(f"a writer process cannot be started: {reason(error)}") from error

    def _meet(self, started: list[bytes]) -> None:
        """Connect the other ranks' writers to rank 0's, when any is new. Collective."""
        if not any(started):
            return

        def listen() -> bytes:
            self._worker.ask({"do": "listen", "secret": self._secret})
            return json.dumps({"host": self.address, "secret": self._secret, "port": self._answer("port")}).encode()

        def join() -> bytes:
            if self.group.rank != 0:
                self._worker.ask({"do": "join", "rank": self.group.rank, **meeting})
                self._answer("joined")
            return b""

        try:
            if self.group.size > 1:
                meeting = json.loads(first_rank(self.group, listen))
                all_ranks(self.group, join)
        except CheckpointError as error:
            raise StagingError(f"writer processes do not reach each other: {error}") from error
        self._met = True

    def _prepare(self, content: Content) -> tuple[Placement, int, str]:
        """Where this rank's bytes go, the memory for them being there; bytes of all ranks' parts; a token."""
        placements: list[Placement] = []

        def ready() -> bytes:
            placements.append(place([*content.pieces, *content.own]))
            state_bytes = len(json.dumps(content.state, allow_nan=False))
            size_bytes = placements[0].size_bytes + state_bytes
            index_bytes = sum(len(extent.name) + _EXTENT_BYTES for extent in placements[0].extents)
            self._fit(size_bytes + index_bytes + _SLACK_BYTES)
            return json.dumps([size_bytes, self._start().decode(), drafts.new_token()]).encode()

        ranks = [json.loads(found) for found in all_ranks(self.group, ready)]
        self._meet([new.encode() for _, new, _ in ranks])
        self._worker.attach()
        return placements[0], sum(size_bytes for size_bytes, _, _ in ranks), ranks[0][2]

    def _fit(self, size_bytes: int) -> None:
        if self.limit_bytes is not None and size_bytes > self.limit_bytes:
            raise StagingError(
                f"staging takes {format_size(size_bytes)}, checkpoint.staging_memory allows "
                f"{format_size(self.limit_bytes)}"
            )
        try:
            self._worker.arena.reserve(size_bytes)
        except OSError as error:
            raise StagingError(f"no memory for staging, {format_size(size_bytes)}: {reason(error)}") from error

    def _copy(self, flight: _Flight, placement: Placement, content: Content) -> None:
        """Copy what must be copied now, and leave the rest to a thread that then asks the writer to write it all."""
        pieces = [*content.pieces, *content.own]
        source = Source(header(flight.identity, self.group.rank), placement, [piece.data for piece in pieces])
        staged = self._worker.arena.view(placement.size_bytes)
        later = [at for at, piece in enumerate(pieces) if piece.steady and self.overlap]
        now = [at for at, piece in enumerate(pieces) if not (piece.steady and self.overlap)]
        source.copy(now, staged, copy_threads())

        def hand_over() -> None:
            try:
                source.copy(later, staged)
                flight.torn = bool(later) and not content.unchanged()
                if flight.torn:
                    raise CheckpointError(
                        "the state was changed while it was copied, outside of an optimizer's step; "
                        "from now on training waits for the copy"
                    )
                source.lay_out(staged)
                self._ask_write(flight, placement, content)
            except ConnectionError:
                pass  # the writer has ended: its answer says how
            except Exception as error:  # told when all ranks meet again
                self._give_up(flight, reason(error))

        flight.handing = threading.Thread(target=hand_over, name="checkpoint-copy", daemon=True)
        flight.handing.start()

    def _ask_write(self, flight: _Flight, placement: Placement, content: Content) -> None:
        rank = self.group.rank
        num_shared = len(content.pieces)
        index = drafts.unwritten_index(flight.identity, rank, placement, num_shared=num_shared, state=content.state)
        sealed, plan = index.seal(), json.dumps(self._plan(flight, content)).encode()
        data_bytes = placement.size_bytes
        behind = sealed + plan if rank == 0 else sealed
        self._worker.arena.reserve(data_bytes + len(behind))
        self._worker.arena.view(data_bytes + len(behind))[data_bytes:] = behind
        self._worker.ask(
            {
                "do": "write",
                "draft": str(flight.draft),
                "rank": rank,
                "data_bytes": data_bytes,
                "index_bytes": len(sealed),
                "plan_bytes": len(behind) - len(sealed),
                "needed_bytes": flight.needed_bytes,
            }
        )

    def _plan(self, flight: _Flight, content: Content) -> dict[str, Any]:
        """What rank 0's writer needs to commit: what the manifest says, and what stays."""
        return {
            "layout": content.layout,
            "metrics": {name: repr(value) for name, value in flight.metrics.items()},
            "policy": asdict(self.policy),
            "protect": self.protect,
        }

    def _give_up(self, flight: _Flight, problem: str) -> None:
        """This rank has nothing to write: rank 0's writer is told, so that it does not wait."""
        flight.problem = problem
        try:
            self._worker.ask(
                {"do": "give_up", "token": flight.identity.token, "why": problem, "kind": CheckpointError.__name__}
            )
        except OSError:
            return  # the writer has ended, as rank 0's notices by itself

    def _outcome(self, flight: _Flight) -> CheckpointInfo:
        """What has become of a save that nobody is busy with any more: rank 0's writer knows. Collective."""
        path = self.root / folders.step_name(flight.identity.step)

        def committed() -> bytes:
            if flight.problem is not None:
                raise CheckpointError(flight.problem)
            return self._committed(flight, path)

        seconds, size_bytes = json.loads(first_rank(self.group, committed))
        return CheckpointInfo(path=path, step=flight.identity.step, size_bytes=size_bytes, seconds=seconds)

    def _committed(self, flight: _Flight, path: Path) -> bytes:
        """When rank 0's writer had it committed, in seconds since it began, and its size."""
        try:
            seconds, size_bytes = self._answer("durable_s") - flight.began_s, self._answer("size_bytes")
        except WorkerLost:
            # It was killed at some moment of the commit: what lies there tells which.
            if flight.draft.exists():
                folders.settle(flight.draft, path)
            try:
                manifest = read_manifest(path)
            except CorruptCheckpoint:
                manifest = None
            if manifest is None or manifest.identity != flight.identity:
                raise
            seconds, size_bytes = monotonic() - flight.began_s, manifest.size_bytes
        return json.dumps([seconds, size_bytes]).encode()

    def _answer(self, key: str) -> Any:
        answer = self._worker.answer()
        if "failed" in answer:
            raise raised(answer["kind"], answer["failed"])
        return answer[key]
