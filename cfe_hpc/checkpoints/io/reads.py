"""Many reads of data files carried out together: each byte once, in file order, several chunks at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cfe_hpc.checkpoints.io.memory import move, page_buffer
from cfe_hpc.checkpoints.io.neighbours import Board, Turn
from cfe_hpc.checkpoints.io.shard_reader import ShardReader
from cfe_hpc.checkpoints.layout import CHUNK_BYTES, SLICE_BYTES

__all__ = ["Batch", "Chunk", "read_all", "read_shared"]

_THREADS = 4
"""Chunks in flight: while one is checked and copied, the disk has others to do. More gain nothing."""

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
        progress: called with the bytes of each chunk that is done, from any thread.

    Raises:
        CorruptCheckpoint: of the first chunk, in their order, that no copy holds as it was written.
    """
    own = threading.local()

    def one(chunk: Chunk) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = page_buffer(SLICE_BYTES)
        chunk.shard.scan_chunk(chunk.index, own.buffer, chunk.deliver, direct=direct)
        if progress is not None:
            progress(chunk.shard.bounds(chunk.index)[1])

    pool = ThreadPoolExecutor(min(_THREADS, max(len(chunks), 1)), "checkpoint-reader")
    try:
        for done in [pool.submit(one, chunk) for chunk in chunks]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_shared(chunks: Mapping[int, Chunk], board: Board) -> None:
    """The same for chunks by their numbers in the checkpoint, of which ranks of this node want some as well."""
    _Shared(chunks, board).run()


class _Shared:
    """Several threads' way through the chunks that a rank wants."""

    def __init__(self, chunks: Mapping[int, Chunk], board: Board) -> None:
        self._chunks, self._board = chunks, board
        self._left = dict.fromkeys(chunks)
        self._picking = threading.Lock()
        self._problems: dict[int, Exception] = {}

    def run(self) -> None:
        self._board.wish(list(self._chunks))
        pool = ThreadPoolExecutor(self._board.threads, "checkpoint-reader")
        try:
            for done in [pool.submit(self._work) for _ in range(self._board.threads)]:
                done.result()
        finally:
            pool.shutdown()
            self._board.forget(list(self._chunks))
        if self._problems:
            raise self._problems[min(self._problems)]

    def _work(self) -> None:
        buffer = None
        while (turn := self._next()) is not None:
            number, place, there = turn
            chunk, good = self._chunks[number], False
            start, size_bytes = chunk.shard.bounds(chunk.index)
            try:
                if place is None:
                    buffer = page_buffer(SLICE_BYTES) if buffer is None else buffer
                    memory = buffer
                else:
                    memory = self._board.place(place)[:size_bytes]
                if there:
                    chunk.deliver(start, memory)
                else:
                    chunk.shard.scan_chunk(chunk.index, memory, chunk.deliver, direct=True)
                good = True
            except Exception as error:
                self._give_up(number, error)
            finally:
                self._board.done(turn, good=good)

    def _next(self) -> Turn | None:
        """What to do next; None when there is no more."""
        with self._picking:
            began_s = time.monotonic()
            while self._left:
                turn = self._board.turn(self._left, alone=time.monotonic() - began_s > _PATIENCE_S)
                if turn is not None:
                    del self._left[turn[0]]
                    return turn
                time.sleep(_POLL_S)
            return None

    def _give_up(self, number: int, error: Exception) -> None:
        with self._picking:
            self._problems[number] = error
            self._left.clear()
