"""Many reads of data files carried out together: each byte once, in file order, several chunks at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cfe_hpc.checkpoints.io.ahead import Ahead, Job, Jobs
from cfe_hpc.checkpoints.io.memory import move, page_buffer
from cfe_hpc.checkpoints.io.neighbours import Board, Turn
from cfe_hpc.checkpoints.io.shard_reader import ShardReader
from cfe_hpc.checkpoints.io.staging import copy_threads
from cfe_hpc.checkpoints.layout import CHUNK_BYTES, SLICE_BYTES

__all__ = ["Batch", "Chunk", "read_all", "read_shared"]

_THREADS = 4
"""Chunks in flight: while one is checked and copied, the disk has others to do. More gain nothing."""

Outcome = TypeVar("Outcome")

_POLL_S = 0.0005
_PATIENCE_S = 5.0
"""For a chunk that another rank is to read, or for a place to read one into; then it is read for this rank alone."""

_Stretch = tuple[int, memoryview]
"""An offset into a data file, and memory for the bytes from there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A chunk to be read and checked, and where parts of it go."""

    shard: ShardReader
    index: int
    parts: Sequence[_Stretch] = ()

    def deliver(self, start: int, content: memoryview) -> None:
        """Copy what the parts want of a slice that begins at `start`."""
        for offset, out in self.parts:
            low, high = max(offset, start), min(offset + len(out), start + len(content))
            if low < high:
                move(out[low - offset : high - offset], content[low - start : high - start])


class Batch:
    """Reads to be carried out together."""

    def __init__(self) -> None:
        self._wanted: dict[ShardReader, dict[int, list[_Stretch]]] = {}
        self.size_bytes = 0

    def add(self, shard: ShardReader, offset: int, out: memoryview) -> None:
        """Fill `out` from the data file's byte `offset` on, when `chunks` are read. All of it lies in the file."""
        if not out:
            return
        chunks = self._wanted.setdefault(shard, {})
        for index in range(offset // CHUNK_BYTES, (offset + len(out) - 1) // CHUNK_BYTES + 1):
            chunks.setdefault(index, []).append((offset, out))
        self.size_bytes += len(out)

    def chunks(self) -> list[Chunk]:
        """What is to be read, in file order, shard by shard."""
        return [
            Chunk(shard=shard, index=index, parts=parts)
            for shard, wanted in sorted(self._wanted.items(), key=lambda item: item[0].rank)
            for index, parts in sorted(wanted.items())
        ]


def read_all(chunks: Sequence[Chunk], *, direct: bool, progress: Callable[[int], None] | None = None) -> None:
    """Read and check chunks, and deliver their parts.

    Args:
        direct: around the page cache, which serves nobody when no other process reads the same bytes.
        progress: called with the bytes of each chunk that is good, from any thread.

    Raises:
        CorruptCheckpoint: of the first chunk, in their order, that no copy holds as it was written.
    """
    line = _Line(chunks, progress)
    _carry_out(line, min(_THREADS, max(len(chunks), 1)), direct=direct)
    line.raise_first()


def read_shared(chunks: Mapping[int, Chunk], board: Board) -> None:
    """The same for chunks by their numbers in the checkpoint, of which ranks of this node want some as well."""
    shared = _Shared(chunks, board)
    board.wish(list(chunks))
    try:
        _carry_out(shared, board.threads, direct=True, ranks_here=board.members)
    finally:
        board.forget(list(chunks))
    shared.raise_first()


def _carry_out(jobs: Jobs, num_chunks: int, *, direct: bool, ranks_here: int = 1) -> None:
    """Have jobs done, `num_chunks` at a time: ahead, by as many threads as there are cores for, or one by each."""
    if direct:
        num_slices = num_chunks * (CHUNK_BYTES // SLICE_BYTES)
        threads = min(copy_threads(ranks_here), num_chunks)
        if all(_on_threads(threads, lambda: Ahead(jobs, num_slices).run())):
            return
    _on_threads(num_chunks, lambda: _by_turns(jobs, direct=direct))


def _on_threads(threads: int, act: Callable[[], Outcome]) -> list[Outcome]:
    """What each of so many threads returns, this one among them."""
    with ThreadPoolExecutor(max(threads - 1, 1), "checkpoint-reader") as pool:
        others = [pool.submit(act) for _ in range(threads - 1)]
        return [act(), *(each.result() for each in others)]


def _by_turns(jobs: Jobs, *, direct: bool) -> None:
    buffer = page_buffer(SLICE_BYTES)
    while not jobs.ended():
        job = jobs.next()
        if job is None:
            time.sleep(_POLL_S)
            continue
        problem = None
        try:
            job.shard.scan_chunk(job.index, job.memory or buffer, job.deliver, direct=direct)
        except Exception as error:
            problem = error
        job.done(problem)


class _Problems:
    """What is wrong with chunks, by their numbers."""

    def __init__(self) -> None:
        self._problems: dict[int, Exception] = {}

    def raise_first(self) -> None:
        if self._problems:
            raise self._problems[min(self._problems)]


class _Line(_Problems):
    """Chunks that are read one after the other; a `Jobs`."""

    def __init__(self, chunks: Sequence[Chunk], progress: Callable[[int], None] | None) -> None:
        super().__init__()
        self._chunks, self._progress = deque(enumerate(chunks)), progress

    def next(self) -> Job | None:
        try:
            number, chunk = self._chunks.popleft()
        except IndexError:
            return None
        done = partial(self._done, number, chunk)
        return Job(shard=chunk.shard, index=chunk.index, deliver=chunk.deliver, memory=None, done=done)

    def ended(self) -> bool:
        return not self._chunks

    def _done(self, number: int, chunk: Chunk, problem: Exception | None) -> None:
        if problem is not None:
            self._problems[number] = problem
            self._chunks.clear()  # those before it are done, or begun
        elif self._progress is not None:
            self._progress(chunk.shard.bounds(chunk.index)[1])


class _Shared(_Problems):
    """A rank's way through the chunks that it wants, by turns that it agrees upon with its neighbours; a `Jobs`."""

    def __init__(self, chunks: Mapping[int, Chunk], board: Board) -> None:
        super().__init__()
        self._chunks, self._board = chunks, board
        self._left = dict.fromkeys(chunks)
        self._picking = threading.Lock()
        self._waits_since_s: float | None = None

    def next(self) -> Job | None:
        """The next chunk to be read; what neighbours have read is taken on the way."""
        while (turn := self._turn()) is not None:
            number, place, is_there = turn
            chunk = self._chunks[number]
            start, size_bytes = chunk.shard.bounds(chunk.index)
            memory = None if place is None else self._board.place(place)[:size_bytes]
            done = partial(self._done, turn)
            if not is_there:
                return Job(shard=chunk.shard, index=chunk.index, deliver=chunk.deliver, memory=memory, done=done)
            assert memory is not None
            chunk.deliver(start, memory)
            done(None)
        return None

    def ended(self) -> bool:
        return not self._left

    def _turn(self) -> Turn | None:
        with self._picking:
            if not self._left:
                return None
            now_s = time.monotonic()
            since_s = now_s if self._waits_since_s is None else self._waits_since_s
            turn = self._board.turn(self._left, alone=now_s - since_s > _PATIENCE_S)
            self._waits_since_s = since_s if turn is None else None
            if turn is not None:
                del self._left[turn[0]]
            return turn

    def _done(self, turn: Turn, problem: Exception | None) -> None:
        self._board.done(turn, good=problem is None)
        if problem is not None:
            with self._picking:
                self._problems[turn[0]] = problem
                self._left.clear()
