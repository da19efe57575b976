"""Copying: bytes of a data file, out of the memory that training owns, into memory that a writer owns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from cfe_hpc.checkpoints.layout import Placement

__all__ = ["Source"]


class Source:
    """The bytes of one data file before they are written: a header, pieces where the layout puts them, zeros between.

    A save that blocks training copies chunk by chunk into the writer's buffers; one that does not copies the whole
    file at once, into an arena that another process writes out. Both call `copy`.
    """

    def __init__(self, header: bytes, placement: Placement, data: Sequence[memoryview]) -> None:
        """`data` has the bytes of each extent of `placement`, in order."""
        self.size_bytes = placement.size_bytes
        filled = [
            (extent.offset, view.cast("B")) for extent, view in zip(placement.extents, data, strict=True) if view.nbytes
        ]
        self._spans = [(0, memoryview(header)), *filled]
        self._starts = [start for start, _ in self._spans]

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
            out[low - start : high - start] = view[low - begin : high - begin]
            at = high
        out[at - start :] = bytes(end - at)
