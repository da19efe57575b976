"""One helper process of each rank, all of them connected: the writers of an attempt, or its drainers."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank, raised, reason
from cfe_hpc.checkpoints.beside.links import SECRET_BYTES
from cfe_hpc.checkpoints.beside.workers import Worker, WorkerLost
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.checkpoints.tiers.places import NodeTier
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint, StagingError

__all__ = ["Crew"]


class Crew:
    """The helpers, as one rank takes part in them.

    Attributes:
        worker: this rank's.
        partner: where the helper listens that takes this rank's shards, as its `host` and `port`; None without one.
    """

    def __init__(
        self,
        group: Group,
        address: str,
        module: str = "cfe_hpc.checkpoints.beside.writer",
        tier: NodeTier | None = None,
    ) -> None:
        """
        Args:
            address: what the other ranks' nodes reach rank 0's by.
            module: what the processes run.
            tier: given when each helper takes the shards of a rank on another node, too.
        """
        self._group, self._address, self._tier = group, address, tier
        self.worker = Worker(module)
        self.partner: dict[str, Any] | None = None
        self._met = False
        self._secret = secrets.token_hex(SECRET_BYTES)

    def start(self) -> list[bytes]:
        """Start the helpers that do not run: it takes them a moment to be there. Collective.

        Returns:
            What `meet` needs to hear.

        Raises:
            StagingError: a rank could not start its own; the same on every rank.
        """
        return all_ranks(self._group, self.started)

    @property
    def is_met(self) -> bool:
        """Whether this rank's helper runs, and is connected."""
        return self._met and self.worker.is_alive

    def started(self) -> bytes:
        """Start this rank's helper unless it runs; what `meet` needs to hear from each rank. Raises StagingError."""
        try:
            if self.worker.start():
                self._met = False
            return b"" if self._met else b"new"
        except OSError as error:
            raise StagingError(f"a writer process cannot be started: {reason(error)}") from error

    def meet(self, started: list[bytes]) -> None:
        """Connect the other ranks' helpers to rank 0's, and each to its partner, when any is new. Collective.

        Args:
            started: what `started` returned on each rank.

        Raises:
            StagingError: they do not reach each other; the same on every rank.
        """
        if not any(started):
            return
        try:
            self._connect()
        except CheckpointError:
            self.start()  # one may have been killed just now
            try:
                self._connect()
            except CheckpointError as error:
                raise StagingError(f"writer processes do not reach each other: {error}") from error
        self._met = True

    def _connect(self) -> None:
        if self._group.size > 1:
            meeting = json.loads(first_rank(self._group, self._listen))
            ports = all_ranks(self._group, lambda: self._join(meeting))
            self.partner = _partner_of(self._group.rank, [json.loads(found) for found in ports])

    def _listen(self) -> bytes:
        self.worker.ask({"do": "listen", "secret": self._secret})
        return json.dumps({"host": self._address, "secret": self._secret, "port": self.answer("port")}).encode()

    def _join(self, meeting: dict[str, Any]) -> bytes:
        """Connect this rank's helper; where it takes another node's shards, or null."""
        if self._group.rank != 0:
            self.worker.ask({"do": "join", "rank": self._group.rank, **meeting})
            self.answer("joined")
        tier = self._tier
        if tier is None or not tier.partner:
            return b"null"
        self.worker.ask({"do": "receive", "home": str(tier.home), "secret": meeting["secret"]})
        where = {"host": tier.address, "port": self.answer("port")}
        return json.dumps({"node": tier.node, "local_rank": tier.local_rank, **where}).encode()

    def answer(self, key: str) -> Any:
        """What the helper says to the last request. Raises CheckpointError when that failed."""
        answer = self.worker.answer()
        if "failed" in answer:
            raise raised(answer["kind"], answer["failed"])
        return answer[key]

    def committed(self, identity: Identity, draft: Path, began_s: float) -> bytes:
        """What has become of a draft that rank 0's helper was to commit: JSON of the seconds since `began_s`, and of
        its bytes. For rank 0.

        Raises:
            CheckpointError: it is not committed.
        """
        path = draft.with_name(folders.step_name(identity.step))
        try:
            seconds, size_bytes = self.answer("durable_s") - began_s, self.answer("size_bytes")
        except WorkerLost:
            # It was killed at some moment of the commit: what lies there tells which.
            if draft.exists():
                folders.settle(draft, path)
            try:
                manifest = read_manifest(path)
            except CorruptCheckpoint:
                manifest = None
            if manifest is None or manifest.identity != identity:
                raise
            seconds, size_bytes = time.monotonic() - began_s, manifest.size_bytes
        return json.dumps([seconds, size_bytes]).encode()


def _partner_of(rank: int, receivers: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The receiver for a rank's shards: on the next node, of the same local rank as far as that node has as many."""
    mine = receivers[rank]
    if mine is None:
        return None
    there = [each for each in receivers if each is not None]
    nodes = sorted({each["node"] for each in there})
    if len(nodes) == 1:
        return None
    following = nodes[(nodes.index(mine["node"]) + 1) % len(nodes)]
    beside = sorted((each for each in there if each["node"] == following), key=lambda each: int(each["local_rank"]))
    at = int(mine["local_rank"]) % len(beside)
    return beside[at]
