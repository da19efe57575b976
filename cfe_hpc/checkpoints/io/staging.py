"""Copying: bytes of a data file, out of the memory that training owns, into memory that a writer owns."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from cfe_hpc.checkpoints.io.memory import HUGE_BYTES, address_of, allocate, move, shared_pages
from cfe_hpc.checkpoints.io.together import Helper, copy_together
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, Placement
from cfe_hpc.checkpoints.protocols import Fetch, HostCopies, OnDevice
from cfe_hpc.errors import CheckpointError

__all__ = ["TAKEN_BACK", "Arena", "Chunks", "Source", "Staged", "copy_threads", "fetch_waiting"]

_log = logging.getLogger(__name__)

TAKEN_BACK = -1
"""Of an arena's `filled_bytes`: what was to be copied is not what was to be saved."""

_WORD_BYTES = 8
_POLL_S = 0.0003
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

    def __init__(
        self,
        header: bytes,
        placement: Placement,
        data: Sequence[memoryview | OnDevice],
        fetch: Fetch | None = None,
    ) -> None:
        """
        Args:
            data: the bytes of each extent of `placement`, in order.
            fetch: what `copy` has devices' bytes copied by. Without it they come to the host now, by this thread and
                behind what it gave the device, wherever chunks are taken.
        """
        self.size_bytes = placement.size_bytes
        self._header = memoryview(header)
        self._data: list[tuple[int, memoryview]] = []
        self._on_devices: dict[int, tuple[int, OnDevice]] = {}
        self._fetch = fetch
        for index, (extent, view) in enumerate(zip(placement.extents, data, strict=True)):
            if not isinstance(view, memoryview):
                if fetch is not None:
                    self._on_devices[index] = (extent.offset, view)
                    self._data.append((extent.offset, memoryview(b"")))
                    continue
                view = view.on_host()
            self._data.append((extent.offset, view.cast("B") if view.nbytes else view[:0]))
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
        taken = [(begin, begin + len(view)) for begin, view in self._spans]
        if self._on_devices:
            taken += [(begin, begin + view.nbytes) for begin, view in self._on_devices.values()]
            taken.sort()
        ends = [*(begin for begin, _ in taken[1:]), self.size_bytes]
        for (_, begin), end in zip(taken, ends, strict=True):
            out[begin:end] = bytes(end - begin)
        out[: len(self._header)] = self._header

    def copy(self, pieces: Sequence[int], out: memoryview, helpers: Sequence[Helper] = ()) -> Iterator[int]:
        """Copy some of the pieces, by their place in `data`, to where they belong in `out`, of the file's size.

        Args:
            helpers: do it together with this thread, which has what is on devices fetched.

        Yields:
            Where what is copied ends, again and again; of these pieces, everything before that is there.
        """
        on_devices = [self._on_devices[piece] for piece in pieces if piece in self._on_devices]
        if not on_devices:
            yield from self._copy_on_host(pieces, out, helpers)
            return
        assert self._fetch is not None
        deque(self._copy_on_host(pieces, out, helpers), maxlen=0)  # they lie among the others
        ends = [at + view.nbytes for at, view in on_devices]
        tasks = [(view, out[at : at + view.nbytes]) for at, view in on_devices]
        yield from (ends[count - 1] for count in self._fetch(tasks))

    def _copy_on_host(self, pieces: Iterable[int], out: memoryview, helpers: Sequence[Helper]) -> Iterator[int]:
        tasks: list[list[tuple[memoryview, memoryview]]] = []
        ends = [0]
        for end, task in self._tasks(pieces, out):
            tasks.append(task)
            ends.append(end)
        yield from (ends[done] for done in copy_together(tasks, helpers))

    def _tasks(
        self, pieces: Iterable[int], out: memoryview
    ) -> Iterator[tuple[int, list[tuple[memoryview, memoryview]]]]:
        """(where it ends in `out`, stretches) of each task, in order; they are of some size, for small tensors many."""
        task: list[tuple[memoryview, memoryview]] = []
        size_bytes = end = 0
        for at, view in (self._data[piece] for piece in pieces):
            for low in range(0, len(view), _STRETCH_BYTES):
                stretch = view[low : low + _STRETCH_BYTES]
                begin, end = at + low, at + low + len(stretch)
                task.append((out[begin:end], stretch))
                size_bytes += len(stretch)
                if size_bytes >= _STRETCH_BYTES:
                    yield end, task
                    task, size_bytes = [], 0
        if task:
            yield end, task


def fetch_waiting(tasks: Sequence[tuple[OnDevice, memoryview]]) -> Iterator[int]:
    """The protocols.Fetch of any device: one copy after the other, straight to where it belongs, each waited for."""
    for count, (data, out) in enumerate(tasks, start=1):
        data.copy_to(out)
        yield count


def copy_threads(ranks_here: int = 1) -> int:
    """Threads that copy while training waits: the cores that this process may use, within reason.

    Args:
        ranks_here: on this node, this one included: where none has cores of its own, each takes its share. With more
            threads than cores one rank's copy ends before another's, and all wait for the last.
    """
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():
        cores //= ranks_here
    return max(1, min(cores, _MAX_THREADS))


class Staged:
    """A data file that lies in an arena, or is still being copied there from its first byte on; a `Chunks`.

    Attributes:
        content: all of it, as far as it is `ready`.
    """

    def __init__(self, arena: Arena, size_bytes: int, serial: int = 0) -> None:
        """`serial` is what Arena.begin returned where it was copied."""
        self.size_bytes, self._arena, self._serial = size_bytes, arena, serial
        self.content = arena.view(size_bytes)

    def ready(self, end: int) -> bool:
        """Whether the bytes before `end` are there by now; raises CheckpointError when they never will be."""
        filled = self._arena.is_filled(end)
        if self._arena.serial != self._serial:
            raise CheckpointError("the memory that it was staged in has another save's bytes by now")
        return filled

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        end = start + len(buffer)
        while not self.ready(end):
            time.sleep(_POLL_S)
        return self.content[start:end]


class Arena:
    """Memory that a rank and its writer share: it has no name, and is gone when both processes are.

    The rank makes it and alone makes it larger; the writer attaches to its file descriptor. A page before what is
    shared tells how much of it is filled: the writer need not wait for the rank's copy to end.

    Attributes:
        copies: what a device's copies into it are done by: set on a rank before it reserves, it has the memory pinned.
        is_pinned: whether a device writes here by itself. Its pages stay where they are for as long.
        is_huge: whether all of it is in huge pages, as this process has made it.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("cfe-checkpoint") if fd is None else fd
        self.copies: HostCopies | None = None
        self.is_pinned = False
        self.is_huge = False
        self._memory = memoryview(b"")

    @property
    def size_bytes(self) -> int:
        """What is reserved, or attached to."""
        return max(len(self._memory) - BLOCK_BYTES, 0)

    def reserve(self, size_bytes: int) -> None:
        """Have at least `size_bytes`, every page of it there and mapped, so that a copy into it is nothing but a copy.

        What lies in it stays.

        Raises:
            OSError: there is no memory for it.
        """
        if size_bytes <= self.size_bytes:
            return
        whole = -(-(size_bytes + BLOCK_BYTES) // HUGE_BYTES) * HUGE_BYTES
        try:
            new_are_huge = allocate(self.fd, len(self._memory), whole)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, len(self._memory))
            raise
        self.is_huge = new_are_huge and (self.is_huge or not self._memory)
        self._map(whole)

    def view(self, size_bytes: int) -> memoryview:
        """The first `size_bytes`; reserved before, by this process or by the one that made the arena."""
        if size_bytes > self.size_bytes:
            self._map(os.fstat(self.fd).st_size)
        return self._memory[BLOCK_BYTES : BLOCK_BYTES + size_bytes]

    def begin(self) -> int:
        """Begin to fill it anew: nothing is `filled`, and who still reads what was in it is told so; the new serial."""
        serial = self.serial + 1
        self._memory[_WORD_BYTES : 2 * _WORD_BYTES] = serial.to_bytes(_WORD_BYTES, "little")
        self.filled_bytes = 0
        return serial

    @property
    def serial(self) -> int:
        """How often it was begun to be filled."""
        return int.from_bytes(self._memory[_WORD_BYTES : 2 * _WORD_BYTES], "little")

    @property
    def filled_bytes(self) -> int:
        """The bytes, from the first on, that the writer may take; TAKEN_BACK when it never may."""
        return int.from_bytes(self._memory[:_WORD_BYTES], "little", signed=True)

    @filled_bytes.setter
    def filled_bytes(self, value: int) -> None:
        self._memory[:_WORD_BYTES] = value.to_bytes(_WORD_BYTES, "little", signed=True)

    def is_filled(self, size_bytes: int) -> bool:
        """Whether the first `size_bytes` are filled by now.

        Raises:
            CheckpointError: they never will be.
        """
        filled_bytes = self.filled_bytes
        if filled_bytes == TAKEN_BACK:
            raise CheckpointError("the state was changed while it was copied, outside of an optimizer's step")
        return filled_bytes >= size_bytes

    @property
    def memory(self) -> memoryview:
        """All that is mapped; it begins where a huge page may."""
        return self._memory

    def _map(self, size_bytes: int) -> None:
        memory = shared_pages(self.fd, size_bytes)
        self._unpin()
        self._memory = memory
        if self.copies is not None:
            self._pin(self.copies)

    def _pin(self, copies: HostCopies) -> None:
        try:
            copies.pin(address_of(self._memory), len(self._memory))
            self.is_pinned = True
        except OSError as error:
            _log.warning("staging memory cannot be pinned (%s): copies from the device take longer", error)
            self.copies = None  # what was refused once is not asked for again; the copies themselves go on

    def _unpin(self) -> None:
        if self.is_pinned and self.copies is not None:
            self.is_pinned = False
            self.copies.unpin(address_of(self._memory))

    def close(self) -> None:
        """Give the memory back, as far as nobody else has it."""
        self._unpin()
        self._memory = memoryview(b"")
        os.close(self.fd)
