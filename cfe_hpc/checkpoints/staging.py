"""Copying: bytes of a data file, out of the memory that training owns, into memory that a writer owns."""

from __future__ import annotations

import contextlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from cfe_hpc.checkpoints.layout import Placement
from cfe_hpc.checkpoints.memory import move

__all__ = ["Arena", "Chunks", "Source", "Staged"]

_PAGE_BYTES = mmap.PAGESIZE
_STRIDE_BYTES = 1 << 20


class Chunks(Protocol):
    """The bytes of one data file, to be written chunk by chunk."""

    size_bytes: int

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        """The `len(buffer)` bytes from `start` on, page-aligned: in `buffer`, or where they lie already."""


class Source:
    """The bytes of one data file before they are written: a header, pieces where the layout puts them, zeros between.

    A save that blocks training copies chunk by chunk into the writer's buffers; one that does not copies the whole
    file at once, into an arena that another process writes out. It is a `Chunks`.
    """

    def __init__(self, header: bytes, placement: Placement, data: Sequence[memoryview]) -> None:
        """`data` has the bytes of each extent of `placement`, in order."""
        self.size_bytes = placement.size_bytes
        filled = [
            (extent.offset, view.cast("B")) for extent, view in zip(placement.extents, data, strict=True) if view.nbytes
        ]
        self._spans = [(0, memoryview(header)), *filled]
        self._starts = [start for start, _ in self._spans]

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        self.copy(start, buffer)
        return buffer

    def copy(self, start: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from `start` on."""
        end, at = start + len(out), start
        for index in range(max(bisect_right(self._starts, start) - 1, 0), len(self._spans)):
            begin, view = self._spans[index]
            if begin >= end:
                break
            low, high = max(begin, at), min(begin + len(view), end)
            if low >= high:
                continue
            out[at - start : low - start] = bytes(low - at)
            move(out[low - start : high - start], view[low - begin : high - begin])
            at = high
        out[at - start :] = bytes(end - at)


class Staged:
    """A data file that lies in an arena, whole; a `Chunks` that copies nothing."""

    def __init__(self, content: memoryview) -> None:
        self.size_bytes, self._content = len(content), content

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        return self._content[start : start + len(buffer)]


class Arena:
    """Memory that a rank and its writer share: it has no name, and is gone when both processes are.

    The rank makes it and alone makes it larger; the writer attaches to its file descriptor.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("cfe-checkpoint") if fd is None else fd
        self._memory = memoryview(b"")

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
        mapped = mmap.mmap(self.fd, whole)
        mapped[::_PAGE_BYTES] = bytes(whole // _PAGE_BYTES)
        self._memory = memoryview(mapped)

    def view(self, size_bytes: int) -> memoryview:
        """The first `size_bytes`; reserved before, by this process or by the one that made the arena."""
        if size_bytes > len(self._memory):
            self._memory = memoryview(mmap.mmap(self.fd, os.fstat(self.fd).st_size))
        return self._memory[:size_bytes]

    def close(self) -> None:
        """Give the memory back, as far as nobody else has it."""
        self._memory = memoryview(b"")
        os.close(self.fd)
