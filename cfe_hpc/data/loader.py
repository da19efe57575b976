"""Batches for ranks: every window once per epoch, in an order that depends on nothing but the seed.

The position is one number, the global samples consumed. Sample s is window `order.window_at(s)`, and a global
batch is the next `global_batch` samples, of which rank r of W takes the r-th W-th. So a run goes on exactly where
it stopped at any step, at another world size and with another number of micro-batches too; a batch may span two
epochs. Samples that are to be left out, for a NaN came of them, are passed over by all ranks alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cfe_hpc.data.order import Positions, window_at
from cfe_hpc.data.windows import TokenWindows
from cfe_hpc.errors import CheckpointMismatch, ConfigError, DataError, Problem

__all__ = ["BatchLoader", "EvalBatch", "TokenWindows", "eval_batches"]

Tokens = npt.NDArray[np.int64]

_ORDER_BLOCK = 1 << 14  # most samples whose order is computed at once: they share numpy's cost per call


class BatchLoader:
    """This rank's share of each global batch, endlessly; tracked by `run.track`.

    No call is collective: ranks stay together because all of them count the same samples.

    Args:
        windows: the training windows; the same file on every rank.
        global_batch: windows in one step over all ranks and micro-batches; a multiple of world_size.
        seed: of the order. The same on every rank.

    Attributes:
        samples: global samples consumed or left out so far, the same number on every rank.

    Raises:
        DataError: fewer windows than one global batch.
        ConfigError: global_batch is not a positive multiple of world_size.
    """

    def __init__(
        self, windows: TokenWindows, *, global_batch: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        if global_batch < 1 or global_batch % world_size:
            remedy = f"make it a multiple of the world size, {world_size}"
            raise ConfigError(
                [Problem(file="data", key="global_batch", what="cannot be shared", value=global_batch, remedy=remedy)]
            )
        if len(windows) < global_batch:
            raise DataError(
                f"{windows.path}: {windows.split} has {len(windows)} windows of {windows.seq_len} tokens, fewer than "
                f"one global batch ({global_batch}); add text, or make the batch or seq_len smaller"
            )
        self.windows = windows
        self.global_batch = global_batch
        self.seed = seed
        self.samples = 0
        self._share = global_batch // world_size
        self._first = rank * self._share
        self._block = min(_ORDER_BLOCK, len(windows))
        self._order: tuple[int, Positions] = (-1, np.empty(0, dtype=np.int64))
        self._skipped: list[tuple[int, int]] = []
        # Windows that are read from the file are read one batch ahead, to hide a parallel filesystem's latency.
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Tokens]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the next sample belongs to, from 0."""
        return self._next(self.samples, 1)[0][0] // len(self.windows)

    def next_batch(self) -> Tokens:
        """This rank's windows of the next global batch, int64, [global_batch / world_size, seq_len + 1].

        Raises:
            DataError: a chunk of the file is damaged.
        """
        position = self.samples
        batch = self._read(position) if self.windows.in_memory else self._read_ahead(position)
        self.samples = self._following(position)
        return batch

    def window_indices(self, position: int) -> Positions:
        """This rank's window numbers of the global batch that starts at global sample `position`."""
        others, parts = self._first, []
        for first, stop in self._next(position, self._first + self._share):
            passed = min(others, stop - first)
            others, first = others - passed, first + passed
            while first < stop:
                block, offset = divmod(first, self._block)
                parts.append(self._order_of(block)[offset : offset + stop - first])
                first += len(parts[-1])
        return np.concatenate(parts)

    def window_ahead(self, batches: int) -> tuple[int, int]:
        """Global samples [start, stop) of the global batch that comes after `batches` others."""
        position = self._next(self.samples, batches * self.global_batch)[-1][1] if batches else self.samples
        span = self._next(position, self.global_batch)
        return span[0][0], span[-1][1]

    def skip_window(self, start: int, stop: int) -> None:
        """Leave global samples [start, stop) out from now on, at any world size; doing so again changes nothing."""
        self._skipped = _joined([*self._skipped, (start, stop)])
        self._ahead = None

    def _following(self, position: int) -> int:
        """Where the global batch after the one at `position` starts."""
        return self._next(position, self.global_batch)[-1][1]

    def _next(self, position: int, count: int) -> list[tuple[int, int]]:
        """The next `count` samples from `position` on that are not left out, as intervals; `count` is at least 1."""
        intervals: list[tuple[int, int]] = []
        for start, stop in (*self._skipped, (sys.maxsize, sys.maxsize)):
            if position < start:
                end = min(start, position + count)
                intervals.append((position, end))
                count -= end - position
                if not count:
                    break
            position = max(position, stop)
        return intervals

    def _order_of(self, block: int) -> Positions:
        known, order = self._order
        if known != block:
            samples = np.arange(block * self._block, (block + 1) * self._block, dtype=np.int64)
            order = window_at(samples, len(self.windows), seed=self.seed)
            self._order = (block, order)
        return order

    def state_dict(self) -> dict[str, Any]:
        """The position, what it is a position in, and what is left out; the same on every rank."""
        return {"samples": self.samples, "skipped": [list(each) for each in self._skipped], **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`, saved at any world size and any global batch.

        Raises:
            CheckpointMismatch: it was saved over other tokens, another seq_len or another seed; names each.
        """
        wrong = list(self.check_state_dict(state))
        if wrong:
            raise CheckpointMismatch("; ".join(wrong))
        self.samples = int(state["samples"])
        self._skipped = _joined((int(start), int(stop)) for start, stop in state.get("skipped", ()))
        self._ahead = None

    def check_state_dict(self, state: dict[str, Any]) -> Iterator[str]:
        """Why `load_state_dict` would refuse a state; a checkpoint asks before anything is loaded."""
        wrong = [
            f"{key} was {state.get(key)}, is {value}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if wrong:
            yield (
                f"{self.windows.path}: the data position is of other data: {'; '.join(wrong)}; "
                "use the same token file, seq_len and seed, or start a new run"
            )

    def _identity(self) -> dict[str, Any]:
        windows = self.windows
        return {
            "seed": self.seed,
            "split": windows.split,
            "seq_len": windows.seq_len,
            "windows": len(windows),
            "tokens_sha256": windows.tokens_sha256,
        }

    def _read(self, position: int) -> Tokens:
        return self.windows.read(self.window_indices(position))

    def _read_ahead(self, position: int) -> Tokens:
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cfe-data")
        if self._ahead is None or self._ahead[0] != position:
            self._ahead = (position, self._reader.submit(self._read, position))
        batch = self._ahead[1].result()
        following = self._following(position)
        self._ahead = (following, self._reader.submit(self._read, following))
        return batch


def _joined(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals in order, those that meet or overlap as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalBatch:
    """One batch of an evaluation.

    Attributes:
        tokens: int64, [batch, seq_len + 1].
        weights: float32, [batch]; 1 for a window that counts, 0 for a repetition that only fills the batch up.
    """

    tokens: Tokens
    weights: npt.NDArray[np.float32]


def eval_batches(
    windows: TokenWindows, *, batch: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[EvalBatch]:
    """This rank's part of a fixed set of windows: all of them, or `limit` spread evenly over the split.

    The set does not depend on the world size, and every rank gets the same number of batches, so that collectives
    inside a forward pass stay in step; where windows run out, weights are 0. Sum weighted losses and weights over
    the ranks, then divide.

    Args:
        batch: windows of one rank in one forward pass, at least 1.
        limit: windows in all over all ranks; None for the whole split.
    """
    count = len(windows) if limit is None else min(limit, len(windows))
    chosen = np.arange(count, dtype=np.int64) * len(windows) // count
    for start in range(0, count, batch * world_size):
        places = start + rank * batch + np.arange(batch)
        tokens = windows.read(chosen[np.minimum(places, count - 1)])
        yield EvalBatch(tokens=tokens, weights=(places < count).astype(np.float32))
