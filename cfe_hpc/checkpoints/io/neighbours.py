"""Ranks of one node that read one checkpoint: a chunk that several of them want is read and checked by one, for all.

They share memory: a table of who wants what, and places for chunks. Nobody depends on another: who does not get a
chunk so in time reads it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cfe_hpc.checkpoints.io.memory import HUGE_BYTES, collapse, shared_pages
from cfe_hpc.checkpoints.layout import CHUNK_BYTES

__all__ = ["Board", "Neighbours", "Turn"]

_AT_A_TIME = 8
"""Chunks in flight on a node, but one of each rank at least: they keep a disk busy."""

_PLACES_FOR_EACH = 2
"""Of a chunk in flight: one is taken by the others while the next is read."""

_ATTEMPTS = 4

_READING, _READY = 0, 1

Turn = tuple[int, int | None, bool]
"""A chunk's number, the place where it is or goes (None for nobody's), and whether it is there by now."""


class Neighbours:
    """One rank's part in the sharing; `offer` what it has, `meet` those that are near, `close` in the end."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("cfe-checkpoint-reads")
        self.board: Board | None = None

    def offer(self) -> bytes:
        """What the other ranks are to be shown."""
        return json.dumps([_node(), os.getpid(), self._fd, os.fstat(self._fd).st_ino]).encode()

    def meet(self, offers: Sequence[bytes], rank: int, num_chunks: int) -> None:
        """Share with the ranks of this node, if there are others, as `board`: without memory for it, with none.

        Not collective. `close` is not to be called on any rank before all have done this.

        Args:
            offers: all ranks'.
            num_chunks: of the checkpoint.
        """
        found = [json.loads(each) for each in offers]
        near = [number for number, each in enumerate(found) if each[0] == found[rank][0]]
        if len(near) < 2:
            return
        with contextlib.suppress(OSError):
            if near[0] != rank:
                self._join(*found[near[0]][1:])
            self.board = Board.on(self._fd, mine=near.index(rank), members=len(near), num_chunks=num_chunks)

    def _join(self, pid: int, number: int, inode: int) -> None:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        os.close(self._fd)
        self._fd = fd
        if os.fstat(fd).st_ino != inode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def close(self) -> None:
        """Give the memory back, as far as nobody else has it."""
        self.board = None
        os.close(self._fd)


def _node() -> str:
    """The same for processes that find each other below /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # a sandbox without: nobody is near
        return secrets.token_hex()


def _gather(memory: memoryview) -> bool:
    """Have memory in huge pages, which others may use by now; whether there are any."""
    for _attempt in range(_ATTEMPTS):  # it fails while another process gathers the same
        for at in range(0, len(memory), HUGE_BYTES):
            _ = memory[at]  # only what is mapped, if but in part, can be gathered
        if collapse(memory):
            return True
    return False


class Board:
    """The memory that neighbours share, as one of them sees it. Used by any thread."""

    def __init__(self, fd: int, *, mine: int, members: int, num_chunks: int) -> None:
        """
        Args:
            fd: of a file in memory, the same for all.
            mine: which one this is of `members`.

        Raises:
            OSError: there is no memory.
        """
        self.threads = max(1, _AT_A_TIME // members)
        self.members = members
        self._fd, self._mine, self._num_chunks = fd, mine, num_chunks
        num_places = _PLACES_FOR_EACH * self.threads * members
        words = 8 * num_places
        head = -(-(2 * words + members * num_chunks) // HUGE_BYTES) * HUGE_BYTES
        size_bytes = head + num_places * CHUNK_BYTES
        os.ftruncate(fd, size_bytes)
        memory = shared_pages(fd, size_bytes, populate=False)
        # Of each place: the chunk in it, counted from 1 on, or 0; and what has become of it.
        self._chunks, self._states = memory[:words].cast("q"), memory[words : 2 * words].cast("q")
        self._wishes = memory[2 * words : head]  # of each member, a byte for each chunk
        self._places = [memory[at : at + CHUNK_BYTES] for at in range(head, size_bytes, CHUNK_BYTES)]
        self._is_huge = _gather(memory[:head])
        self._gathered: set[int] = set()
        self._thread = threading.Lock()

    @classmethod
    def on(cls, fd: int, *, mine: int, members: int, num_chunks: int) -> Board | None:
        """A new one; None where it has no huge pages: a disk fills others so slowly that it gains nothing."""
        board = cls(fd, mine=mine, members=members, num_chunks=num_chunks)
        return board if board._is_huge else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._thread:
            fcntl.flock(self._fd, fcntl.LOCK_EX)  # gone with the process that holds it
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def wish(self, numbers: Sequence[int]) -> None:
        """Tell the others what this one wants: what is read is kept until it has taken it."""
        with self._locked():
            for number in numbers:
                self._wishes[self._mine * self._num_chunks + number] = 1

    def forget(self, numbers: Sequence[int]) -> None:
        """Take back wishes."""
        with self._locked():
            for number in numbers:
                self._wishes[self._mine * self._num_chunks + number] = 0

    def turn(self, left: Mapping[int, object], *, alone: bool) -> Turn | None:
        """What to do next, of chunks that this one wished for; None for waiting.

        Args:
            alone: as if there were no others.
        """
        with self._locked():
            held = {number - 1: place for place, number in enumerate(self._chunks) if number}
            there = [number for number, place in held.items() if number in left and self._states[place] == _READY]
            if there:
                return min(there), held[min(there)], True
            number = next((number for number in left if alone or number not in held), None)
            if number is None:
                return None
            if alone or not any(self._wishers(number, but=self._mine)):
                return number, None, False
            place = next((place for place in range(len(self._places)) if self._is_free(place)), None)
            if place is None:
                return None
            self._chunks[place], self._states[place] = number + 1, _READING
            return number, place, False

    def _wishers(self, number: int, but: int | None = None) -> Iterator[int]:
        return (self._wishes[member * self._num_chunks + number] for member in range(self.members) if member != but)

    def _is_free(self, place: int) -> bool:
        number = self._chunks[place]
        return not number or (self._states[place] == _READY and not any(self._wishers(number - 1)))

    def place(self, place: int) -> memoryview:
        """The memory of a place, for the chunk that is or goes there."""
        memory = self._places[place]
        if place not in self._gathered:
            _gather(memory)
            self._gathered.add(place)
        return memory

    def done(self, turn: Turn, *, good: bool) -> None:
        """This one has taken what it wanted of a chunk; if it was its turn to read that, whether it is `good`."""
        number, place, was_there = turn
        with self._locked():
            self._wishes[self._mine * self._num_chunks + number] = 0
            if place is not None and not was_there:
                self._states[place] = _READY
                if not good:
                    self._chunks[place] = 0
