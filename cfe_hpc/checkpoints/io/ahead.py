"""Reading chunks ahead: a thread that gives the disk the next slices, and checks and copies those that have come."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.io.aio import AT_ONCE, DEPTH, NoQueueError, Queue, kept_queue
from cfe_hpc.checkpoints.io.memory import page_buffer
from cfe_hpc.checkpoints.io.shard_reader import ShardReader
from cfe_hpc.checkpoints.layout import SLICE_BYTES

__all__ = ["Ahead", "Job", "Jobs"]

_POLL_S = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A chunk to be read and checked.

    Attributes:
        deliver: called with each slice and where it begins in the file, before the chunk is checked as a whole: again
            when it has to be read anew.
        memory: for all of the chunk, page-aligned; None for nowhere but what `deliver` makes of it.
        done: called at last, with what is wrong, or None.
    """

    shard: ShardReader
    index: int
    deliver: Callable[[int, memoryview], None]
    memory: memoryview | None
    done: Callable[[Exception | None], None]


class Jobs(Protocol):
    """Where chunks to be read come from; several threads ask."""

    def next(self) -> Job | None:
        """The next; None while there is none for now, or when `ended`."""

    def ended(self) -> bool:
        """Whether no more will come."""


class _Reading:
    """A job that is begun."""

    def __init__(self, job: Job, fd: int) -> None:
        self.job, self.fd = job, fd
        first, size_bytes = job.shard.bounds(job.index)
        self.starts = deque(range(first, first + size_bytes, SLICE_BYTES))
        self.first, self.end = first, first + size_bytes
        self.value = 0
        self.good = True


@dataclass(slots=True)
class _Slice:
    """Part of it, as it is read: into `buffer`, where that is not the job's own memory."""

    reading: _Reading
    start: int
    content: memoryview
    buffer: memoryview | None
    result: int | None = None


class Ahead:
    """One thread's reads. They go around the page cache, to the nearest copy of each shard; what that does not hold as
    it was written is read once more, as ShardReader reads: from the others, too."""

    def __init__(self, jobs: Jobs, num_slices: int) -> None:
        """
        Args:
            num_slices: at most so many in flight.
        """
        self._jobs = jobs
        self._depth = min(num_slices, DEPTH)
        whole = page_buffer(self._depth * SLICE_BYTES)
        self._free = [whole[at : at + SLICE_BYTES] for at in range(0, len(whole), SLICE_BYTES)]
        self._spare = page_buffer(SLICE_BYTES)
        self._reading: _Reading | None = None  # of which slices are still to be begun
        self._slices: deque[_Slice] = deque()
        self._tags: dict[int, _Slice] = {}
        self._begun = self._at_once = 0

    def run(self) -> bool:
        """Do jobs until they have ended.

        Returns:
            False when others may be left: the kernel or the filesystem does not read while its caller goes on. The jobs
            that were begun are done.
        """
        try:
            with kept_queue() as queue:
                return self._run(queue)
        except NoQueueError:
            return False

    def _run(self, queue: Queue) -> bool:
        while True:
            if self._begin(queue):
                continue
            if self._slices:
                self._go_on(queue)
            elif self._at_once == AT_ONCE:
                return False
            elif self._jobs.ended():
                return True
            else:
                time.sleep(_POLL_S)  # what is left is another's turn

    def _go_on(self, queue: Queue) -> None:
        """Take the first slice, or wait for it."""
        if self._slices[0].result is None:
            self._take_note(queue, wait_s=_POLL_S if self._has_room() else None)
        else:
            self._finish(self._slices.popleft())
            self._take_note(queue, wait_s=0.0)

    def _has_room(self) -> bool:
        return len(self._slices) < self._depth

    def _begin(self, queue: Queue) -> bool:
        """Give the disk another slice, or begin another job, if there is one and room for it."""
        if not self._has_room():
            return False
        if self._reading is None and self._at_once < AT_ONCE and (job := self._jobs.next()) is not None:
            self._reading = self._opened(job)
            return True
        if self._reading is None:
            return False
        self._read(queue, self._reading)
        if not self._reading.starts:
            self._reading = None
        return True

    def _opened(self, job: Job) -> _Reading | None:
        try:
            return _Reading(job, job.shard.open_nearest())
        except OSError:
            job.done(self._read_anew(job))
            return None

    def _read(self, queue: Queue, reading: _Reading) -> None:
        start = reading.starts.popleft()
        size_bytes = min(SLICE_BYTES, reading.end - start)
        if reading.job.memory is None:
            buffer = self._free.pop()
            each = _Slice(reading, start, buffer[:size_bytes], buffer)
        else:
            at = start - reading.first
            each = _Slice(reading, start, reading.job.memory[at : at + size_bytes], None)
        self._slices.append(each)
        tag, self._begun = self._begun, self._begun + 1
        try:
            queue.read(reading.fd, each.content, start, tag)
        except OSError as error:
            each.result = -(error.errno or errno.EIO)
            return
        self._tags[tag] = each
        if tag < AT_ONCE:
            self._take_note(queue, wait_s=0.0)
            self._at_once += each.result is not None

    def _take_note(self, queue: Queue, wait_s: float | None) -> None:
        for tag, result in queue.done(wait_s=wait_s):
            self._tags.pop(tag).result = result

    def _finish(self, each: _Slice) -> None:
        """Check and deliver a slice that has come; they come here in order."""
        reading = each.reading
        if reading.good:
            reading.good = each.result == len(each.content)
        if reading.good:
            # The copy first: it gets the bytes out of the core's cache.
            reading.job.deliver(each.start, each.content)
            reading.value = crc32c(each.content, reading.value)
        if each.buffer is not None:
            self._free.append(each.buffer)
        if each.start + len(each.content) == reading.end:
            os.close(reading.fd)
            as_written = reading.good and reading.value == reading.job.shard.index.chunks[reading.job.index]
            reading.job.done(None if as_written else self._read_anew(reading.job))

    def _read_anew(self, job: Job) -> Exception | None:
        """Read a job from whichever copy holds it; what is wrong when none does."""
        try:
            job.shard.scan_chunk(job.index, job.memory or self._spare, job.deliver, direct=True)
        except Exception as error:
            return error
        return None
