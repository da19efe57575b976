"""Saving beside training: ranks copy their state into memory of their own, and a writer process each writes it out.

A save blocks training for the copy alone, or, with `overlap`, not even for that: what only an optimizer's step
changes is copied while the next forward and backward go on, and awaited before that step. The writers commit among
themselves. At step boundaries ranks tell each other whether they are `busy`; when none is, the checkpoint is durable,
or has failed on all of them. One save is in flight at most, so that nothing is ever copied over what is still to be
written.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank, reason
from cfe_hpc.checkpoints.beside.crew import Crew
from cfe_hpc.checkpoints.beside.flight import Flight
from cfe_hpc.checkpoints.beside.hand import Hand
from cfe_hpc.checkpoints.beside.preparing import Preparation
from cfe_hpc.checkpoints.beside.workers import WorkerLost
from cfe_hpc.checkpoints.io.shard import header
from cfe_hpc.checkpoints.io.staging import TAKEN_BACK, Source, copy_threads, fetch_waiting
from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.layout import Placement
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.checkpoints.protocols import Fetch, Group, HostCopies, OnDevice, Piece
from cfe_hpc.checkpoints.state.uncollected import uncollected
from cfe_hpc.checkpoints.store import CheckpointInfo, Content
from cfe_hpc.checkpoints.tiers.drain import Drain
from cfe_hpc.checkpoints.tiers.places import NodeTier, bytes_on_node, record
from cfe_hpc.errors import CheckpointError

__all__ = ["Background"]

_GIVE_WAY_S = 0.0005
"""The thread that hands over waits so long: it would take the interpreter from training before that is on its way."""


def _nobody(word: str, detail: str) -> None:
    del word, detail


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
        tier: the nodes' own disks, where saves go first; None without them.
        drain: the way from there to the shared filesystem; None without a tier.
        on_nodes: the newest step of this attempt that is complete on the nodes.
        degraded: called on every rank with a word and a line when saves go on, but not as asked for.
        copies: what copies from this rank's device while it computes; None to wait for every such copy at `begin`.
        ranks_here: on this node, this one included.
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
    tier: NodeTier | None = None
    degraded: Callable[[str, str], None] = _nobody
    copies: HostCopies | None = None
    ranks_here: int = 1
    drain: Drain | None = field(default=None, init=False)
    on_nodes: int | None = field(default=None, init=False)
    _crew: Crew = field(init=False)
    _flight: Flight | None = field(default=None, init=False)
    _alone: bool = field(default=False, init=False)
    _preparation: Preparation = field(init=False)
    _hand: Hand = field(default_factory=lambda: Hand("checkpoint-copy"), init=False)
    _copiers: list[Hand] = field(init=False)

    def __post_init__(self) -> None:
        self._crew = Crew(self.group, self.address, tier=self.tier)
        self._crew.worker.arena.copies = self.copies
        if self.tier is not None:
            drainers = Crew(self.group, self.address, "cfe_hpc.checkpoints.tiers.drainer")
            self.drain = Drain(self.root, self.tier, self.policy, self.protect, self.attempt, drainers)
        node = 0 if self.tier is None else self.tier.node
        self._preparation = Preparation(self.group, self._crew, self.drain, node=node, limit_bytes=self.limit_bytes)
        # Training's own thread copies, too.
        self._copiers = [Hand("checkpoint-copier") for _ in range(copy_threads(self.ranks_here) - 1)]

    @property
    def in_flight(self) -> int | None:
        """The step of the save in flight, the same on every rank; None without one."""
        return None if self._flight is None else self._flight.identity.step

    @property
    def writer_pid(self) -> int | None:
        """Process id of this rank's writer; None before the first and after the last."""
        return self._crew.worker.pid

    def start(self) -> None:
        """Start the writers: it takes them a moment to be there. Collective.

        Raises:
            StagingError: a rank could not start its own; the same on every rank.
        """
        self._crew.start()
        if self.drain is not None:
            self.drain.start()

    def reserve(self, content: Content) -> None:
        """Get the memory that a save of `content` takes, ahead of it. Collective; without a save in flight.

        Raises:
            CheckpointError: a piece does not fit its dtype and shape; the same on every rank.
            StagingError: there is less memory than it takes; the same on every rank.
        """
        self._preparation.prepare(content)
        for hand in (self._hand, *self._copiers):  # its thread starts
            hand.do(lambda: None).wait()
        gc.collect()  # it takes 0.1 s with torch loaded, and would come while training waits for a save

    def is_ready(self, form: object) -> bool:
        """Whether this rank could begin a save of content of this form at once; see Capturing.take."""
        return self._preparation.is_ready(form)

    def begin(self, content: Content, *, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Copy the state; on return training may change it, but for steady pieces with `overlap`: see `settle`.

        Collective; without a save in flight.

        Raises:
            CheckpointError: nothing was begun; the same on every rank.
            StagingError: the same, for want of memory or writers.
        """
        assert self._flight is None
        began_s = monotonic()
        with uncollected():
            prepared = self._preparation.prepare(content)
            identity = Identity(
                run_id=self.run_id, step=step, attempt=self.attempt, world_size=self.group.size, token=prepared.token
            )
            flight = Flight(
                identity=identity,
                draft=self.root / folders.draft_name(step, self.attempt, prepared.token),
                needed_bytes=sum(size_bytes for _, size_bytes in prepared.sizes),
                to_nodes=self.tier is not None,
                node_bytes=0 if self.tier is None else bytes_on_node(self.tier, prepared.sizes),
                metrics={name: float(value) for name, value in (metrics or {}).items()},
                began_s=began_s,
            )
            try:
                self._copy(flight, prepared.placement, content)
            except Exception as error:  # told when all ranks meet again: the others have begun
                self._give_up(flight, reason(error))
            self._flight = flight

    def settle(self) -> None:
        """Wait until this rank's state is copied: it may change from then on. Not collective."""
        if self._flight is not None and self._flight.handed is not None:
            self._flight.copied.wait()

    def _await_handed(self) -> None:
        """Wait until the writer knows all that it must of the save in flight."""
        if self._flight is not None and self._flight.handed is not None:
            self._flight.handed.wait()

    def busy(self) -> bool:
        """Whether this rank's writer has something to do still; to be agreed upon, then passed to `advance`."""
        flight = self._flight
        if flight is None or flight.handed is None or flight.complete:
            return False
        # Also when this rank has given up: its writer may be making the file that it was told of before.
        return not flight.handed.is_set() or self._crew.worker.busy()

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
        try:
            if flight.to_nodes:
                self._advance_on_nodes(flight)
                return None
            self._flight = None
            return self._outcome(flight)
        except CheckpointError:
            self._flight = None
            # What changes outside of an optimizer's step is copied while training waits, from now on.
            self.overlap = self.overlap and not self.group.all_max([int(flight.torn)])[0]
            if self.group.rank == 0:
                shutil.rmtree(flight.draft, ignore_errors=True)
            raise

    def _advance_on_nodes(self, flight: Flight) -> None:
        """The writers have written to the nodes, or one could not: then all write to the shared filesystem."""
        assert self.drain is not None
        if not flight.complete:
            try:
                self._complete(flight)
            except CheckpointError as error:
                flight.to_nodes = False
                self.drain.keep(drop=flight.identity)
                if self.group.all_max([int(flight.problem is not None)])[0]:
                    raise  # a rank has nothing that it could write elsewhere
                self.degraded("checkpoint_local", str(error))
                self._crew.worker.ask(flight.request)
                return
        if self.drain.step is None:
            self._flight = None
            self.drain.begin(self.group, flight.identity, flight.began_s)

    def _complete(self, flight: Flight) -> None:
        """Note that a save is complete on the nodes. Raises CheckpointError: it is not; the same on every rank."""

        def written() -> bytes:
            if flight.problem is not None:
                raise CheckpointError(flight.problem)
            try:
                return json.dumps(self._crew.answer("without_partner")).encode()
            except WorkerLost as error:
                flight.problem = reason(error)
                raise

        without = [json.loads(why) for why in all_ranks(self.group, written)]
        assert self.tier is not None
        flight.complete, self.on_nodes = True, flight.identity.step
        missing = [f"rank {rank}: {why}" for rank, why in enumerate(without) if why is not None]
        if missing and not self._alone:
            self.degraded("checkpoint_partner", f"step {flight.identity.step}: {'; '.join(missing)}")
        self._alone = bool(missing)
        if self.group.rank == 0:
            with contextlib.suppress(OSError):  # a full disk is told of when it matters
                record(self.root, flight.identity.step, self.attempt, "local", self.tier.hosts)

    def finish(self) -> CheckpointInfo | None:
        """Wait for the save in flight, if there is one, to be complete on the nodes, or else durable. Collective.

        Returns and raises as `advance`.
        """
        done = None
        while self._flight is not None and not self._flight.complete:
            self._await_handed()
            self._crew.worker.wait()
            self.group.barrier()  # a draft that one has failed to write is removed when no other writes there
            done = self.advance(busy=False)
        return done

    def close(self) -> None:
        """End this rank's writer, whatever it does, and give the memory back."""
        self._await_handed()
        self._flight = None
        for hand in (self._hand, *self._copiers):
            hand.close()
        self._crew.worker.close()
        if self.drain is not None:
            self.drain.close()

    def _copy(self, flight: Flight, placement: Placement, content: Content) -> None:
        """Copy what must be copied now; a thread asks the writer to follow, and copies the rest."""
        arena = self._crew.worker.arena
        flight.prepare(self.group.rank, placement.size_bytes, arena.begin())
        if not flight.to_nodes:
            self._crew.worker.tell({"do": "open", **flight.request})
        pieces = [*content.pieces, *content.own]
        head, data = header(flight.identity, self.group.rank), [piece.data for piece in pieces]
        source = Source(head, placement, data, self._fetch(data))
        staged = arena.view(placement.size_bytes)
        now, later = self._order(pieces)
        copied_now: Future[None] = Future()
        source.lay_out(staged)
        rest = partial(source.copy, later, staged) if later else None
        flight.handed = self._hand.do(partial(self._hand_over, flight, placement, content, copied_now, rest))
        try:
            ends = source.copy(now, staged, self._copiers)
            if later:
                deque(ends, maxlen=0)  # they lie among those that are copied later
            else:
                self._announce(ends, placement)
        except Exception as error:
            copied_now.set_exception(error)
        else:
            copied_now.set_result(None)

    def _hand_over(
        self,
        flight: Flight,
        placement: Placement,
        content: Content,
        copied_now: Future[None],
        rest: Callable[[], Iterable[int]] | None,
    ) -> None:
        if rest is not None:
            sleep(_GIVE_WAY_S)
        try:
            if flight.to_nodes:  # a writer that was not asked to open a file follows from here on
                self._ask_write(flight, placement, content)
            copied_now.result()
            if rest is not None:
                self._announce(rest(), placement)
                flight.torn = not content.unchanged()
            self._crew.worker.arena.filled_bytes = TAKEN_BACK if flight.torn else placement.size_bytes
            flight.copied.set()
            if not flight.to_nodes:  # while the disk writes
                self._ask_write(flight, placement, content)
        except Exception as error:  # told when all ranks meet again
            self._give_up(flight, reason(error))
        finally:
            flight.copied.set()

    def _announce(self, ends: Iterable[int], placement: Placement) -> None:
        for end in ends:
            self._crew.worker.arena.filled_bytes = min(end, placement.size_bytes - 1)  # the whole is announced last

    def _order(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """The places of the pieces that are copied now, and of those that are copied while training goes on."""
        beside = self.copies is not None  # a device's bytes that only a waiting thread can copy are copied now
        waits = [self.overlap and piece.steady and (beside or type(piece.data) is memoryview) for piece in pieces]
        places = range(len(pieces))
        return [at for at in places if not waits[at]], [at for at in places if waits[at]]

    def _fetch(self, data: Iterable[memoryview | OnDevice]) -> Fetch:
        """What bytes on devices are copied by; they are those that this thread's work so far leaves there."""
        devices = {each.device for each in data if not isinstance(each, memoryview)}
        if self.copies is None or not devices:
            return fetch_waiting
        return partial(self.copies.fetch, after=self.copies.boundary(devices))

    def _ask_write(self, flight: Flight, placement: Placement, content: Content) -> None:
        rank = self.group.rank
        num_shared = len(content.pieces)
        index = drafts.unwritten_index(flight.identity, rank, placement, num_shared=num_shared, state=content.state)
        sealed, plan = index.seal(), json.dumps(flight.plan(content, self.policy, self.protect)).encode()
        data_bytes = placement.size_bytes
        behind = sealed + plan if rank == 0 else sealed
        if data_bytes + len(behind) > self._crew.worker.arena.size_bytes:
            self._preparation.forget()  # the state outgrows what it was given: next time that is looked at
        self._crew.worker.arena.reserve(data_bytes + len(behind))
        self._crew.worker.arena.view(data_bytes + len(behind))[data_bytes:] = behind
        flight.request |= {"do": "write", "index_bytes": len(sealed), "plan_bytes": len(behind) - len(sealed)}
        to_node = flight.to_node(self.tier, self._crew.partner) if self.tier is not None and flight.to_nodes else {}
        self._crew.worker.ask({**flight.request, **to_node})

    def _give_up(self, flight: Flight, problem: str) -> None:
        """This rank has nothing to write: rank 0's writer is told, so that it does not wait."""
        flight.problem = problem
        self._crew.worker.arena.filled_bytes = TAKEN_BACK
        self._crew.worker.ask(
            {"do": "give_up", "token": flight.identity.token, "why": problem, "kind": CheckpointError.__name__}
        )

    def _outcome(self, flight: Flight) -> CheckpointInfo:
        """What has become of a save that nobody is busy with any more: rank 0's writer knows. Collective."""
        path = self.root / folders.step_name(flight.identity.step)

        def committed() -> bytes:
            if flight.problem is not None:
                raise CheckpointError(flight.problem)
            return self._crew.committed(flight.identity, flight.draft, flight.began_s)

        seconds, size_bytes = json.loads(first_rank(self.group, committed))
        return CheckpointInfo(path=path, step=flight.identity.step, size_bytes=size_bytes, seconds=seconds)
