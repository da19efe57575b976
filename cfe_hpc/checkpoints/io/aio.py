"""Reads and writes that a disk does while their process goes on: the kernel's asynchronous I/O (io_submit(2)).

A thread for each request in flight would have to be given a core whenever its request has been done; training has
the cores. Here the disk is given the next requests ahead, and what comes back is looked at when there is time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
from collections.abc import Iterator

from cfe_hpc.checkpoints.io.memory import address_of

__all__ = ["AT_ONCE", "DEPTH", "NoQueueError", "Queue", "kept_queue"]

DEPTH = 16
"""Requests that the disk has ahead: it is busy until a core is free for the next ones. A virtual disk may tell of none
before all that it was given are done, and then stands still until there are more: the fewer such pauses, the better."""

AT_ONCE = 4
"""So many requests in a row, each done before its call returns, tell that this filesystem does none beside."""

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""System calls io_setup, io_destroy, io_getevents, io_submit; the C library has no names for them."""

_PREAD, _PWRITE = 0, 1


class _Request(ctypes.Structure):
    """struct iocb of linux/aio_abi.h, on machines that put the low byte first."""

    _fields_ = (
        ("tag", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("flags", ctypes.c_int32),
        ("operation", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("size_bytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("more_flags", ctypes.c_uint32),
        ("event_fd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """struct io_event."""

    _fields_ = (
        ("tag", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Queue:
    """Requests in flight, at most `depth`.

    Used by one thread. Files are to be opened with O_DIRECT, and memory, offsets and sizes to be multiples of a block:
    the kernel does other requests at once, while the caller waits.
    """

    def __init__(self, depth: int) -> None:
        """
        Raises:
            OSError: this kernel, or what guards it, has no asynchronous I/O.
        """
        numbers = _NUMBERS.get(platform.machine())
        if numbers is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._setup, self._destroy, self._getevents, self._submit = numbers
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._context = ctypes.c_ulong(0)
        self._call(self._setup, ctypes.c_long(depth), ctypes.byref(self._context))
        self.depth = depth
        self._events = (_Event * depth)()
        # What is in flight, by its tag: the memory must stay.
        self._in_flight: dict[int, memoryview] = {}

    def close(self) -> None:
        """Wait for all requests, and end. The kernel takes its time for that (measured: 30 to 40 ms)."""
        self._call(self._destroy, self._context)
        self._in_flight.clear()

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._in_flight)

    def read(self, fd: int, buffer: memoryview, offset: int, tag: int) -> None:
        """Begin to fill `buffer` from `offset` on; no two requests in flight have the same tag.

        Raises:
            OSError: it cannot be begun.
        """
        self._begin(_PREAD, fd, buffer, offset, tag)

    def write(self, fd: int, buffer: memoryview, offset: int, tag: int) -> None:
        """Begin to write `buffer` at `offset`; as `read`."""
        self._begin(_PWRITE, fd, buffer, offset, tag)

    def _begin(self, operation: int, fd: int, buffer: memoryview, offset: int, tag: int) -> None:
        request = _Request(
            tag=tag, operation=operation, fd=fd, address=address_of(buffer), size_bytes=len(buffer), offset=offset
        )
        requests = (ctypes.c_void_p * 1)(ctypes.addressof(request))
        self._call(self._submit, self._context, ctypes.c_long(1), requests)
        self._in_flight[tag] = buffer

    def done(self, *, wait_s: float | None = None) -> list[tuple[int, int]]:
        """What has been done since it was asked last.

        Args:
            wait_s: how long to wait for the first; None for as long as it takes.

        Returns:
            (tag, bytes) of each; a negative number of bytes is that errno.
        """
        if not self._in_flight:
            return []
        whole_s, rest_s = divmod(wait_s or 0.0, 1.0)
        limit = None if wait_s is None else ctypes.byref(_Timespec(int(whole_s), int(rest_s * 1e9)))
        least = ctypes.c_long(0 if wait_s == 0 else 1)
        found = self._call(self._getevents, self._context, least, ctypes.c_long(self.depth), self._events, limit)
        events = [(event.tag, event.result) for event in self._events[:found]]
        for tag, _ in events:
            del self._in_flight[tag]
        return events

    def _call(self, number: int, *arguments: object) -> int:
        while (result := self._libc.syscall(ctypes.c_long(number), *arguments)) < 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return int(result)


class NoQueueError(Exception):
    """This kernel, or what guards it, has no asynchronous I/O."""


_idle: list[Queue] = []
"""Kept for the files to come: to end one takes as long as to write 80 MB."""


@contextlib.contextmanager
def kept_queue() -> Iterator[Queue]:
    """A queue without requests, of DEPTH, whose user leaves none. Raises NoQueueError."""
    try:
        queue = _idle.pop()
    except IndexError:
        try:
            queue = Queue(DEPTH)
        except OSError as error:
            raise NoQueueError from error
    try:
        yield queue
    except BaseException:
        queue.close()
        raise
    _idle.append(queue)
