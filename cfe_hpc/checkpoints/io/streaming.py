"""Chunks on their way into a file: as many at a time as keep the disk busy, each summed on the way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.io.aio import AT_ONCE, NoQueueError, Queue, kept_queue
from cfe_hpc.checkpoints.io.memory import page_buffer
from cfe_hpc.checkpoints.io.staging import Chunks, Staged
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, CHUNK_BYTES, SLICE_BYTES

__all__ = ["stream"]

_THREADS = 4
"""Chunks in flight: while one is fetched and summed, and waits for a core to do it, the disk has others."""

_UNSUMMED = 64
"""Chunks whose checksums may wait until the whole file is staged: the cores are wanted for that."""

_POLL_S = 0.0005


def stream(fd: int, source: Chunks) -> tuple[int, ...]:
    """Write all chunks to where they belong in a file opened for writing, with O_DIRECT or without; not synced.

    Returns:
        crc32c of each chunk.

    Raises:
        OSError: without the file's name.
    """
    if isinstance(source, Staged) and _is_direct(fd):
        with contextlib.suppress(_NotBesideError, NoQueueError), kept_queue() as queue:
            return _Ahead(fd, source, queue).run()
    return _on_threads(fd, source)


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


class _NotBesideError(Exception):
    """The kernel or the filesystem does not write while its caller goes on."""


class _Ahead:
    """One thread that gives the disk the next chunks ahead, and sums them while it writes."""

    def __init__(self, fd: int, source: Staged, queue: Queue) -> None:
        self._fd, self._source, self._queue = fd, source, queue
        self._starts = range(0, source.size_bytes, CHUNK_BYTES)
        self._begun = 0
        self._at_once = 0
        self._sums: list[int] = []
        self._unwritten: dict[int, memoryview] = {}  # of each chunk that is begun, what the disk still has to take

    def run(self) -> tuple[int, ...]:
        while len(self._sums) < len(self._starts) or self._unwritten:
            waits = False
            if self._begun < len(self._starts) and len(self._queue) < self._queue.depth:
                if self._source.ready(self._end(self._begun)):
                    self._begin()
                    continue
                waits = True
            unsummed = self._begun - len(self._sums)
            if unsummed > _UNSUMMED or (unsummed and self._source.ready(self._source.size_bytes)):
                self._sums.append(crc32c(self._content(len(self._sums))))
                self._take_note(wait_s=0.0)
            elif self._unwritten:
                # The more the disk has ahead, the longer it does without: to look costs training its core each time.
                self._take_note(wait_s=_POLL_S * len(self._queue) if waits or unsummed else None)
            else:
                time.sleep(_POLL_S)
        return tuple(self._sums)

    def _end(self, chunk: int) -> int:
        return min(self._starts[chunk] + CHUNK_BYTES, self._source.size_bytes)

    def _content(self, chunk: int) -> memoryview:
        return self._source.content[self._starts[chunk] : self._end(chunk)]

    def _begin(self) -> None:
        chunk = self._begun
        self._begun += 1
        self._write(chunk, self._content(chunk))
        if chunk < AT_ONCE:
            self._take_note(wait_s=0.0)
            self._at_once += chunk not in self._unwritten
            if self._at_once == AT_ONCE:
                raise _NotBesideError

    def _write(self, chunk: int, content: memoryview) -> None:
        self._unwritten[chunk] = content
        try:
            self._queue.write(self._fd, content, self._end(chunk) - len(content), chunk)
        except OSError as error:
            raise _NotBesideError if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) else error from error

    def _take_note(self, wait_s: float | None) -> None:
        for chunk, written_bytes in self._queue.done(wait_s=wait_s):
            if written_bytes == -errno.EINVAL:
                raise _NotBesideError  # O_DIRECT is refused only now: the other way knows what to do
            if written_bytes <= 0 or written_bytes % BLOCK_BYTES:
                code = -written_bytes if written_bytes < 0 else errno.EIO
                raise OSError(code, os.strerror(code))
            rest = self._unwritten.pop(chunk)[written_bytes:]
            if rest:
                self._write(chunk, rest)


def _on_threads(fd: int, source: Chunks) -> tuple[int, ...]:
    own = threading.local()

    def one(first: int) -> int:
        if not hasattr(own, "buffer"):
            own.buffer = page_buffer(SLICE_BYTES)
        value, end = 0, min(first + CHUNK_BYTES, source.size_bytes)
        for start in range(first, end, SLICE_BYTES):
            content = source.chunk(start, own.buffer[: min(SLICE_BYTES, end - start)])
            value = crc32c(content, value)
            _write_all(fd, content, start)
        if not _is_direct(fd):
            # Write-back begins now: left to itself it begins at fsync, which then takes several times as long.
            os.posix_fadvise(fd, first, end - first, os.POSIX_FADV_DONTNEED)
        return value

    pool = ThreadPoolExecutor(_THREADS, "checkpoint-writer")
    try:
        return tuple(pool.map(one, range(0, source.size_bytes, CHUNK_BYTES)))
    finally:
        pool.shutdown(cancel_futures=True)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    refused = False
    while data:
        try:
            written = os.pwrite(fd, data, offset)
        except OSError as error:
            # Not told by the flag: another thread may have met the same and cleared it since.
            if error.errno != errno.EINVAL or refused:
                raise
            refused = True
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            continue
        data, offset = data[written:], offset + written
