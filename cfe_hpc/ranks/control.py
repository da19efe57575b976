"""The control plane: a gloo group of its own, beside whatever collectives the training uses.

Agreement must not depend on the user's process group: it may not exist yet, use a device backend that would
synchronise the device, or be mid-collective on a failing rank. torch is imported on first use: a run of one rank
never needs it here.
"""

from __future__ import annotations

import atexit
import time
from array import array
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module
from typing import Any

from cfe_hpc.checkpoints.protocols import Group, SoloGroup
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.rendezvous import Meeting, await_listener

__all__ = ["GlooGroup", "connect"]

# Ranks reach a boundary at different times when one evaluates or builds data alone; a dead peer is noticed at
# once by its closed connection, so that a long limit costs nothing there.
_TIMEOUT_S = 3600.0


def connect(facts: RankFacts, meeting: Meeting) -> Group:
    """The group of all ranks of the attempt. Collective: every rank calls it once."""
    if facts.world_size == 1:
        return SoloGroup()
    return GlooGroup(facts.rank, facts.world_size, meeting)


class GlooGroup:
    """`Group` over torch's gloo backend. See checkpoints.protocols.Group for each method's contract."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        # As Any: torch exports these names but does not type them.
        torch: Any = import_module("torch")
        dist: Any = import_module("torch.distributed")
        self.rank, self.size = rank, size
        timeout = timedelta(seconds=_TIMEOUT_S)
        if rank:
            await_listener(meeting.address, meeting.control_port)
        # The group lives as long as its store: keep it.
        self._store = dist.TCPStore(meeting.address, meeting.control_port, size, rank == 0, timedelta(seconds=300))
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("control", self._store), rank, size, timeout)
        # Their threads abort the process when they outlive the interpreter: a completed rank would exit with 134.
        atexit.register(self._close)
        self._max = dist.AllreduceOptions()
        self._max.reduceOp = dist.ReduceOp.MAX
        self._torch = torch
        self._dist = dist

    def all_max(self, values: Sequence[int]) -> list[int]:
        if not values:
            return []
        flags = self._torch.frombuffer(array("q", values), dtype=self._torch.int64)
        self._group.allreduce([flags], self._max).wait()
        agreed: list[int] = flags.tolist()
        return agreed

    def all_gather(self, data: bytes) -> list[bytes]:
        longest = self.all_max([len(data)])[0]
        mine = self._bytes(len(data).to_bytes(8, "little") + data, longest + 8)
        every = [self._torch.empty(longest + 8, dtype=self._torch.uint8) for _ in range(self.size)]
        self._group.allgather([every], [mine]).wait()
        return [_unpack(tensor) for tensor in every]

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        size = self.all_max([len(data) if self.rank == source else 0])[0]
        if not size:
            return b""
        tensor = self._bytes(data if self.rank == source else b"", size)
        options = self._dist.BroadcastOptions()
        options.rootRank = source
        self._group.broadcast([tensor], options).wait()
        return bytes(tensor.numpy().tobytes())

    def barrier(self) -> None:
        self.all_max([0])

    def try_sum(self, size_bytes: int, limit_s: float) -> tuple[bool, float]:
        """Sum so many bytes over all ranks: whether the sum is right, and the seconds it took. Collective.

        Raises:
            RuntimeError: it did not end within the limit, or a peer is gone.
        """
        values = self._torch.full((max(1, size_bytes // 8),), self.rank + 1, dtype=self._torch.int64)
        began_s = time.monotonic()
        self._group.allreduce([values], self._dist.AllreduceOptions()).wait(timedelta(seconds=limit_s))
        seconds = time.monotonic() - began_s
        return bool((values == self.size * (self.size + 1) // 2).all().item()), seconds

    def _close(self) -> None:
        self._group = self._store = None

    def _bytes(self, data: bytes, size: int) -> Any:
        return self._torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=self._torch.uint8)


def _unpack(tensor: Any) -> bytes:
    raw = tensor.numpy().tobytes()
    size = int.from_bytes(raw[:8], "little")
    return bytes(raw[8 : 8 + size])
