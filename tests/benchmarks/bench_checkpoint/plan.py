"""What is measured at which size and on how many ranks. What is left out is named in NOTES, printed with the tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

MIDDLE_BYTES = 1_000_000_000
LARGE_BYTES = 3_000_000_000

BARE = "bare-write"
"""No way of saving: as many bytes written while training goes on, without a copy, without checksums."""

WAYS = (
    BARE,
    "cfe",
    "cfe-async",
    "cfe-overlap",
    "torch.save",
    "safetensors",
    "dcp",
    "dcp-2-threads",
    "dcp-async-thread",
    "dcp-async-process",
    "dcp-async-thread-staging",
    "dcp-async-process-staging",
)
LARGE_WAYS = (BARE, "cfe", "cfe-async", "cfe-overlap", "safetensors", "dcp-async-thread-staging")
ONLY_ON_TWO = ("dcp-2-threads", "dcp-async-thread", "dcp-async-process")
"""Not the best of their kind: from MIDDLE_BYTES on they are measured on two ranks alone."""

ZERO_WAYS = ("deepspeed", "cfe-deepspeed", "cfe-deepspeed-async", "cfe-deepspeed-overlap")
DECOUPLED = "deepspeed-decoupled"
EVERY_WAY = (*WAYS, *ZERO_WAYS, DECOUPLED)

LOADED = ("cfe", "torch.save", "safetensors", "dcp", "deepspeed", "cfe-deepspeed")
"""Ways whose files are loaded, too; the others of a family write the same ones."""

MOVED = ("cfe", "dcp")
"""Ways whose files are loaded on other numbers of ranks."""

DCP_ASYNC = tuple(way for way in WAYS if way.startswith("dcp-async"))

NOTES = (
    "returns: a synchronous call before its fsync. "
    "x copy, x write and x read: beside the limit of the same round and the same bytes. slower: a step while the save "
    "goes on, beside one before. lost: seconds of computing, blocked and slowed together. first x: blocked and durable "
    "of the first save beside the median. elsewhere x: a load on the other numbers of ranks beside one on the same. "
    "memory x: the most taken beyond the state, beside the state. bare-write: as many bytes written while training "
    "goes on, by a thread, without a copy or checksums.",
    f"From {MIDDLE_BYTES / 1e9:.0f} GB on {', '.join(ONLY_ON_TWO)} and DeepSpeed are measured on two ranks only; from "
    f"{LARGE_BYTES / 1e9:.0f} GB on only {', '.join(LARGE_WAYS)}, loaded on other ranks after a save of two.",
    "DeepSpeed is measured at ZeRO 3 on other numbers of ranks than two; its decoupled writer on two ranks.",
    "Of DCP's two ways with a process, the one whose turn came first has paid for its start in its first save.",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table: a state of some size on some ranks.

    Attributes:
        zero: DeepSpeed's stage, 0 for the plain sharded state.
        decoupled: DeepSpeed's decoupled writer alone.
    """

    state_bytes: int
    ranks: int
    ways: tuple[str, ...]
    zero: int = 0
    decoupled: bool = False

    @property
    def name(self) -> str:
        """As in "1.5 GB, 2 ranks, ZeRO 3"."""
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        zero = f", ZeRO {self.zero}" if self.zero else ""
        return f"{self.state_bytes / 1e9:g} GB, {ranks}{zero}{', decoupled' if self.decoupled else ''}"

    def units(self) -> list[str]:
        """What a round consists of: the limits, and every way."""
        if self.decoupled:
            return [DECOUPLED]
        cores = len(os.sched_getaffinity(0))
        threads = sorted({1, max(1, cores // self.ranks)})
        return [*(f"copy {count}" for count in threads), "bare direct", "bare buffered", *self.ways]

    def moved(self, way: str, every: Sequence[int]) -> list[int]:
        """Other numbers of ranks that load what `way` saved."""
        if self.zero or way not in MOVED or (self.ranks != 2 and self.state_bytes >= LARGE_BYTES):
            return []
        return [ranks for ranks in every if ranks != self.ranks]

    def weight(self) -> float:
        """Seconds that a round takes, roughly."""
        per_gb = {"dcp": 3.0, "cfe": 3.0, "torch.save": 2.0, "safetensors": 2.0, "deepspeed": 2.5}
        cost = sum(per_gb.get(unit.split(" ")[0], 2.5) for unit in self.units())
        return 0.6 * len(self.units()) + cost * self.state_bytes / 1e9


def cases(sizes: Sequence[int], ranks: Sequence[int], methods: Sequence[str], stages: Sequence[int]) -> list[Case]:
    """Every table, in the order of measuring. `stages` are DeepSpeed's."""
    found = []
    for state_bytes in sizes:
        for size in ranks:
            ways = tuple(way for way in _ways(state_bytes, size) if way in methods)
            if ways:
                found.append(Case(state_bytes=state_bytes, ranks=size, ways=ways))
        for size in ranks:
            found += _zero_cases(state_bytes, size, methods, stages)
    return found


def _ways(state_bytes: int, ranks: int) -> tuple[str, ...]:
    if state_bytes >= LARGE_BYTES:
        return LARGE_WAYS
    if state_bytes >= MIDDLE_BYTES and ranks != 2:
        return tuple(way for way in WAYS if way not in ONLY_ON_TWO)
    return WAYS


def _zero_cases(state_bytes: int, ranks: int, methods: Sequence[str], stages: Sequence[int]) -> list[Case]:
    if state_bytes >= LARGE_BYTES or (state_bytes >= MIDDLE_BYTES and ranks != 2):
        return []
    here = [stage for stage in stages if stage == 3 or ranks == 2]
    ways = tuple(way for way in ZERO_WAYS if way in methods)
    found = [Case(state_bytes=state_bytes, ranks=ranks, ways=ways, zero=stage) for stage in here if ways]
    if DECOUPLED in methods and 3 in here and ranks == 2:
        found.append(Case(state_bytes=state_bytes, ranks=ranks, ways=(DECOUPLED,), zero=3, decoupled=True))
    return found
