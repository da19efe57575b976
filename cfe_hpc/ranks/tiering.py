"""Where a Run's checkpoints lie beside the shared filesystem: on the nodes, and at a remote."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank
from cfe_hpc.checkpoints.beside.background import Background
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.store import CheckpointInfo
from cfe_hpc.checkpoints.tiers import nodelocal, places, reclaim
from cfe_hpc.checkpoints.tiers.onward import Onward
from cfe_hpc.checkpoints.tiers.places import NodeTier
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint
from cfe_hpc.ranks.bootstrap import Place

__all__ = ["Tiering", "own_address"]

logger = logging.getLogger(__name__)

_LAST_PUSH_S = 600.0
"""How long a run that has completed waits for its last checkpoint to reach the remote."""

_SIOCGIFADDR = 0x8915

_POLL_S = 0.02

Tell = Callable[[str, str], None]
Settle = Callable[[int, Callable[[], CheckpointInfo | None]], None]


class Tiering:
    """The tiers of one attempt, as one rank takes part in them.

    Attributes:
        node: the node-local tier; None without one.
    """

    def __init__(self, root: Path, spec: RunSpec, place: Place, degraded: Tell) -> None:
        """`degraded` is told a word and a line when a tier is not as asked for."""
        self._root, self._spec, self._place, self._degraded = root, spec, place, degraded
        self._policy = spec.job.checkpoint
        self.node: NodeTier | None = None
        self._onward: Onward | None = None
        if self._policy.remote is not None and place.group.rank == 0:
            self._onward = Onward(
                root,
                self._policy.remote,
                run_id=spec.run_id,
                attempt=place.facts.attempt,
                keep_last=self._policy.remote_keep_last,
                every_steps=self._policy.remote_every_steps,
            )

    def gather(self, report: Callable[[Path, str], None]) -> int | None:
        """Bring home what is newer elsewhere than on the shared filesystem. Collective.

        Args:
            report: called on rank 0 for each checkpoint there that cannot be used.

        Returns:
            The step that was brought; None when there was none.

        Raises:
            CheckpointError: there is one, and it cannot be brought: to start without it would lose it.
        """
        run_id, attempt, group = self._spec.run_id, self._place.facts.attempt, self._place.group
        step = None
        if self._policy.local:
            self._find_node()
        if self.node is not None:
            step = reclaim.reclaim(self._root, self.node, run_id=run_id, attempt=attempt, group=group, report=report)
        if self._policy.remote is not None and attempt > 0:
            none = first_rank(group, lambda: b"" if folders.committed(self._root) else b"none")
            if none:
                url = self._policy.remote
                step = reclaim.fetch(self._root, url, run_id=run_id, attempt=attempt, group=group, report=report)
        return step

    def rescue(self, report: Callable[[Path, str], None]) -> Iterator[int]:
        """Bring home one checkpoint after the other that nodes or the remote have, the highest step first: for when
        none on the shared filesystem can be used. Collective; after `gather`.

        Args:
            report: called on rank 0 for each that cannot be used either.

        Yields:
            A step that is on the shared filesystem now.
        """
        run_id, attempt, group = self._spec.run_id, self._place.facts.attempt, self._place.group
        found: list[reclaim.Found] = []
        try:
            if self.node is not None:
                found += reclaim.on_nodes(self._root, self.node, run_id=run_id, attempt=attempt, group=group)
            if self._policy.remote is not None:
                found += reclaim.at_remote(self._root, self._policy.remote, run_id=run_id, attempt=attempt, group=group)
        except CheckpointError as error:
            self._degraded("checkpoint_remote", f"{error}; what it has is not used")
        # Of one step, the nodes' copy is the nearer one.
        for each in sorted(found, key=lambda each: each.step, reverse=True):
            try:
                each.bring()
            except CorruptCheckpoint as error:
                reclaim.tell(each, error, group, report)
            except CheckpointError as error:
                self._degraded("checkpoint_copy", f"step {each.step} {each.where} cannot be used: {error}")
            else:
                yield each.step

    def _find_node(self) -> None:
        nodes: list[NodeTier] = []

        def find() -> bytes:
            nodes.append(self._node())
            nodelocal.make_home(nodes[0].home)
            return b""

        try:
            all_ranks(self._place.group, find)
            self.node = nodes[0]
        except CheckpointError as error:
            self._degraded("checkpoint_local", str(error))

    def _node(self) -> NodeTier:
        facts, node_local = self._place.facts, self._spec.site.storage.node_local
        if node_local is None:
            raise CheckpointError("the site names no storage.node_local")
        return NodeTier(
            home=nodelocal.expand_home(node_local, self._spec.run_id, os.environ),
            node=facts.node_rank,
            local_rank=facts.local_rank,
            hosts=facts.hosts,
            address=own_address(self._place, self._spec.site.network.interface),
            keep_last=self._policy.local_keep_last,
            limit_bytes=self._policy.local_size,
            partner=self._policy.partner and facts.num_nodes > 1,
        )

    def places(self, folder: Path, identity: Identity, rank: int) -> Sequence[Path]:
        """Folders with a copy of a rank's shard, the nearest first."""
        return places.places_of(self.node, folder, identity, rank)

    def resumed(self, opened: Opened) -> None:
        """Tell of copies that were bad, and replaced by others. Collective."""
        self.offer(opened.step)
        if self.node is None:
            return
        faults = all_ranks(self._place.group, lambda: "; ".join(opened.faults).encode())
        told = [f"rank {rank}: {fault.decode()}" for rank, fault in enumerate(faults) if fault]
        if told:
            self._degraded("checkpoint_copy", "; ".join(told))

    def make_way(self, background: Background, settle: Settle) -> None:
        """Leave what is complete on the nodes where it is, if it has not arrived yet: a newer one is to come, and has
        little time. Nothing is lost by that, so nothing is told. Collective."""
        self._await_arrival(background, settle, lambda: 0.0)

    def arrive(
        self, background: Background, settle: Settle, time_left_s: Callable[[], float | None] = lambda: None
    ) -> None:
        """Wait until what is complete on the nodes is on the shared filesystem, too, or until time is up: then it
        stays where it is, and that is told. Collective; rank 0's clock counts.

        Args:
            background: its drain is not None; what it has in flight is complete on the nodes.
            settle: called with a step and what takes note of its end.
        """
        for step in self._await_arrival(background, settle, time_left_s):
            self._degraded("checkpoint_local", f"time is up: step {step} stays on the nodes for now")

    def _await_arrival(
        self, background: Background, settle: Settle, time_left_s: Callable[[], float | None]
    ) -> list[int]:
        """Steps that did not arrive in time."""
        drain, group, left = background.drain, self._place.group, list[int]()
        assert drain is not None
        while drain.step is not None or background.in_flight is not None:
            if drain.step is None:
                background.advance(busy=False)
                continue
            left_s = time_left_s() if group.rank == 0 else None
            busy, is_up = group.all_max([int(drain.busy()), int(left_s is not None and left_s <= 0)])
            if not busy:
                settle(drain.step, partial(drain.advance, group, False))
            elif is_up:
                left.append(drain.step)
                drain.abandon(group)
            else:
                time.sleep(_POLL_S)
        return left

    def forget(self, steps_from: int) -> None:
        """Delete this node's copies of checkpoints of `steps_from` steps and more: they must not be brought home by
        the next attempt. Not collective; while none is being written. Failures are logged."""
        if self.node is not None and self.node.local_rank == 0:
            for copy in nodelocal.held(self.node.home):
                if copy.step >= steps_from:
                    folders.discard(copy.folder)

    def offer(self, step: int) -> None:
        """A checkpoint is on the shared filesystem: it may go on from there. Not collective."""
        if self._onward is not None:
            self._onward.offer(step)
            self.advance()

    def advance(self) -> None:
        """Let what goes on from there go on. Not collective."""
        why = None if self._onward is None else self._onward.advance()
        if why is not None:
            self._degraded("checkpoint_remote", why)

    @property
    def needed(self) -> set[int]:
        """Steps whose folders are being read, on rank 0."""
        return set() if self._onward is None else self._onward.steps

    def finish(self) -> None:
        """The run has completed: let its last checkpoint arrive at the remote. Not collective."""
        if self._onward is not None:
            for why in self._onward.finish(_LAST_PUSH_S):
                self._degraded("checkpoint_remote", why)
            self._onward.close()


def own_address(place: Place, interface: str | None) -> str:
    """What other nodes reach this one by: the site's interface, or the way to rank 0's node.

    Raises:
        CheckpointError: this node has no such interface, or it has no address.
    """
    facts, address = place.facts, place.meeting.address
    if facts.num_nodes == 1 or len(set(facts.hosts)) == 1:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            if interface is not None:
                asked = struct.pack("256s", interface.encode()[:15])
                return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)[20:24])
            if facts.node_rank == 0:
                return address
            probe.connect((address, 9))  # sends nothing: only the way is looked up
            return str(probe.getsockname()[0])
        except OSError as error:
            where = f"interface {interface}" if interface is not None else f"the way to {address}"
            raise CheckpointError(f"{where} gives this node no address: {error.strerror}") from error
