"""Copying: bytes of a data file, out of the memory that training owns, into memory that a writer owns."""

from __future__ import annotations

import contextlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from cfe_hpc.checkpoints.layout import Placement
from cfe_hpc.checkpoints.memory import move

__all__ = ["Arena", "Chunks", "Source", "Staged", "copy_threads"]

_STRIDE_BYTES = 1 << 20
_STRETCH_BYTES = 8 << 20
_MAX_THREADS = 4
"""More than these gain little: memory is what they share."""


class Chunks(Protocol):
    """The bytes of one data file, to be written chunk by chunk."""

    size_bytes: int

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        """The `len(buffer)` bytes from `start` on, page-aligned: in `buffer`, or where they lie already."""


class Source:
    """The bytes of one data file before they are written: a header, pieces where the layout puts them, zeros between.

    A save that blocks training copies chunk by chunk into the writer's buffers; one that does not copies the whole
    file into an arena that another process writes out. It is a `Chunks`.
    """

    def __init__(self, header: bytes, placement: Placement, data: Sequence[memoryview]) -> None:
        """`data` has the bytes of each extent of `placement`, in order."""
        self.size_bytes = placement.size_bytes
        self._header = memoryview(header)
        self._data = [
            (extent.offset, view.cast("B") if view.nbytes else view[:0])
            for extent, view in zip(placement.extents, data, strict=True)
        ]
        self._spans = [(0, self._header), *((at, view) for at, view in self._data if view.nbytes)]
        self._starts = [start for start, _ in self._spans]

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        end, at = start + len(buffer), start
        for index in range(max(bisect_right(self._starts, start) - 1, 0), len(self._spans)):
            begin, view = self._spans[index]
            if begin >= end:
                break
            low, high = max(begin, at), min(begin + len(view), end)
            if low >= high:
                continue
            buffer[at - start : low - start] = bytes(low - at)
            move(buffer[low - start : high - start], view[low - begin : high - begin])
            at = high
        buffer[at - start :] = bytes(end - at)
        return buffer

    def lay_out(self, out: memoryview) -> None:
        """Write all but the pieces into `out`, of the file's size: the header, and zeros between pieces."""
        ends = [*self._starts[1:], self.size_bytes]
        for (begin, view), end in zip(self._spans, ends, strict=True):
            out[begin + len(view) : end] = bytes(end - begin - len(view))
        out[: len(self._header)] = self._header

    def copy(self, pieces: Iterable[int], out: memoryview, threads: int = 1) -> None:
        """Copy some of the pieces, by their place in `data`, to where they belong in `out`, of the file's size."""
        stretches = [
            (out[at + low : at + min(low + _STRETCH_BYTES, len(view))], view[low : low + _STRETCH_BYTES])
            for at, view in (self._data[piece] for piece in pieces)
            for low in range(0, len(view), _STRETCH_BYTES)
        ]
        if threads == 1 or len(stretches) < 2:
            for target, view in stretches:
                move(target, view)
            return
        with ThreadPoolExecutor(threads, "checkpoint-copy") as pool:
            for done in [pool.submit(move, *stretch) for stretch in stretches]:
                done.result()


def copy_threads() -> int:
    """Threads that copy while training waits: the cores that this process may use, within reason."""
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS)


class Staged:
    """A data file that lies in an arena, whole; a `Chunks`.

    Chunks are copied out all the same: shared memory has no huge pages, and a disk takes them so much faster that the
    copy is paid for (see memory.page_buffer).
    """

    def __init__(self, content: memoryview) -> None:
        self.size_bytes, self._content = len(content), content

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        move(buffer, self._content[start : start + len(buffer)])
        return buffer


class Arena:
    """Memory that a rank and its writer share: it has no name, and is gone when both processes are.

    The rank makes it and alone makes it larger; the writer attaches to its file descriptor.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("cfe-checkpoint") if fd is None else fd
        self._memory = memoryview(b"")

    @property
    def size_bytes(self) -> int:
        """What is reserved, or attached to."""
        return len(self._memory)

    def reserve(self, size_bytes: int) -> None:
        """Have at least `size_bytes`, every page of it there and mapped, so that a copy into it is nothing but a copy.

        What lies in it is lost when it grows.

        Raises:
            OSError: there is no memory for it; what was there before stays.
        """
        if size_bytes <= len(self._memory):
            return
        whole = -(-size_bytes // _STRIDE_BYTES) * _STRIDE_BYTES
        try:
            os.posix_fallocate(self.fd, 0, whole)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, len(self._memory))
            raise
        self._map(whole)

    def view(self, size_bytes: int) -> memoryview:
        """The first `size_bytes`; reserved before, by this process or by the one that made the arena."""
        if size_bytes > len(self._memory):
            self._map(os.fstat(self.fd).st_size)
        return self._memory[:size_bytes]

    def _map(self, size_bytes: int) -> None:
        mapped = mmap.mmap(self.fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._memory = memoryview(mapped)

    def close(self) -> None:
        """Give the memory back, as far as nobody else has it."""
        self._memory = memoryview(b"")
        os.close(self.fd)
