"""Verified bytes of one rank's data file, wherever copies of it lie."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.io.shard import MAGIC, data_facts, header, num_chunks
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, CHUNK_BYTES
from cfe_hpc.checkpoints.manifest import FileFacts, Identity, ShardIndex, data_name, index_name
from cfe_hpc.errors import CorruptCheckpoint

__all__ = ["ShardReader", "fill", "read_index"]

_KEPT_CHUNKS = 4

Take = Callable[[int, memoryview], None]
"""Called with bytes of a data file and where they begin."""


def read_index(folder: Path, rank: int) -> bytes:
    """A rank's index file, unchecked. Raises CorruptCheckpoint when it is missing or unreadable."""
    try:
        return (folder / index_name(rank)).read_bytes()
    except OSError as error:
        raise _unreadable(index_name(rank), error) from error


class ShardReader:
    """Bytes of one rank's data file, each chunk checked before any of it is handed out.

    Data files are opened for each read, so that thousands of shards need no thousands of file descriptors.

    Attributes:
        index: what the rank saved, and where in its data file.
        places: folders with a copy of the data file, the nearest first.
    """

    def __init__(self, places: Sequence[Path], rank: int, identity: Identity, facts: FileFacts, content: bytes) -> None:
        """Check the index.

        Args:
            identity: the manifest's.
            facts: the index file's, from the manifest.
            content: the index file's.

        Raises:
            CorruptCheckpoint: the index is altered, or of another save.
        """
        self.rank = rank
        self.name = data_name(rank)
        self.places = list(places)
        self._faults: dict[Path, str] = {}
        self.index = _checked_index(content, rank, identity, facts)
        self._kept: OrderedDict[int, bytearray] = OrderedDict()

    def check_header(self, expected: FileFacts) -> None:
        """Check the data file's size, whose it is, and that its checksums are the manifest's; of every copy.

        Raises:
            CorruptCheckpoint: no copy is as it should be.
        """
        if expected != data_facts(expected.size_bytes, self.index.chunks):
            raise CorruptCheckpoint(f"{self.name} has other checksums in its index than in the manifest")
        for place in list(self.places):
            try:
                self._check_header(place, expected)
            except CorruptCheckpoint as error:
                if self.places == [place]:
                    raise
                self.places.remove(place)
                self._note(place, error)

    def _check_header(self, place: Path, expected: FileFacts) -> None:
        path = place / self.name
        try:
            size_bytes = path.stat().st_size
            with open(path, "rb") as stream:
                found = stream.read(BLOCK_BYTES)
        except OSError as error:
            raise _unreadable(self.name, error) from error
        if found != header(self.index.identity, self.rank):
            raise CorruptCheckpoint(f"{self.name} {_whose(found, self.index.identity, self.rank)}")
        if size_bytes != expected.size_bytes or size_bytes != self.index.data_bytes:
            verb = "is truncated" if size_bytes < expected.size_bytes else "has grown"
            raise CorruptCheckpoint(f"{self.name} {verb}: {size_bytes} bytes instead of {expected.size_bytes}")

    def _note(self, place: Path, error: CorruptCheckpoint) -> None:
        self._faults.setdefault(place, f"{place}: {error}")

    @property
    def faults(self) -> list[str]:
        """What is wrong with copies that another stood in for so far, a line for each."""
        return list(self._faults.values())

    def open_nearest(self) -> int:
        """A file descriptor of the nearest copy, around the page cache where its filesystem can. Raises OSError."""
        return _open(self.places[0] / self.name, direct=True)

    def bounds(self, index: int) -> tuple[int, int]:
        """(first byte, bytes) of a chunk."""
        start = index * CHUNK_BYTES
        return start, min(CHUNK_BYTES, self.index.data_bytes - start)

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from the data file's byte `offset` on. Raises CorruptCheckpoint."""
        done = 0
        while done < len(out):
            index = (offset + done) // CHUNK_BYTES
            start, size_bytes = self.bounds(index)
            skip = offset + done - start
            take = min(size_bytes - skip, len(out) - done)
            if take <= 0:
                raise CorruptCheckpoint(f"{self.name} ends before byte {offset + len(out)}")
            part = out[done : done + take]
            if take == size_bytes:
                self.read_chunk(index, part)
            else:
                part[:] = self._chunk(index)[skip : skip + take]
            done += take

    def _chunk(self, index: int) -> memoryview:
        kept = self._kept.pop(index, None)
        if kept is None:
            kept = bytearray(self.bounds(index)[1])
            self.read_chunk(index, memoryview(kept))
        self._kept[index] = kept
        if len(self._kept) > _KEPT_CHUNKS:
            self._kept.popitem(last=False)
        return memoryview(kept)

    def read_chunk(self, index: int, out: memoryview) -> None:
        """Fill `out`, of as many bytes as `bounds` says, with one chunk. Raises CorruptCheckpoint."""
        self.scan_chunk(index, out, lambda start, content: None)

    def scan_chunk(self, index: int, buffer: memoryview, take: Take, *, direct: bool = False) -> None:
        """Read one chunk, slice by slice, from the nearest copy in which it is as it was written.

        Args:
            buffer: memory for a slice.
            take: called with each slice, before the chunk is checked as a whole: again when another copy is tried.
            direct: read around the page cache where the filesystem can; `buffer` must then begin at a page.

        Raises:
            CorruptCheckpoint: no copy has it.
        """
        for place in self.places:
            try:
                self._scan(place / self.name, index, buffer, take, direct)
                return
            except CorruptCheckpoint as error:
                if place == self.places[-1]:
                    raise
                self._note(place, error)

    def _scan(self, path: Path, index: int, buffer: memoryview, take: Take, direct: bool) -> None:
        first, size_bytes = self.bounds(index)
        value, end = 0, first + size_bytes
        try:
            fd = _open(path, direct)
            try:
                for start in range(first, end, len(buffer)):
                    content = buffer[: end - start]
                    fill(fd, start, content, self.name)
                    take(start, content)
                    value = crc32c(content, value)  # after the copy: it gets the bytes out of the core's cache
            finally:
                os.close(fd)
        except OSError as error:
            raise _unreadable(self.name, error) from error
        if value != self.index.chunks[index]:
            raise CorruptCheckpoint(f"{self.name} is altered: bytes {first} to {end} differ from their checksum")


def fill(fd: int, start: int, out: memoryview, name: str) -> None:
    """Fill `out` from a file's byte `start` on; where O_DIRECT is refused now, by way of the page cache.

    Raises:
        CorruptCheckpoint: the file, called `name`, ends before.
        OSError: it cannot be read.
    """
    done = 0
    while done < len(out):
        try:
            got = os.preadv(fd, [out[done:]], start + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        if not got:
            raise CorruptCheckpoint(f"{name} is truncated: it ends before byte {start + len(out)}")
        done += got


def _open(path: Path, direct: bool) -> int:
    if direct:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, os.O_RDONLY)


def _checked_index(content: bytes, rank: int, identity: Identity, facts: FileFacts) -> ShardIndex:
    name = index_name(rank)
    index = ShardIndex.unseal(content, name)
    foreign = identity.difference(index.identity)
    if foreign:
        raise CorruptCheckpoint(f"{name} {foreign}")
    if index.rank != rank:
        raise CorruptCheckpoint(f"{name} belongs to rank {index.rank}, not {rank}")
    if len(content) != facts.size_bytes or crc32c(content) != facts.crc32c:
        raise CorruptCheckpoint(f"{name} is not the file that the manifest names: its checksum differs")
    if len(index.chunks) != num_chunks(index.data_bytes):
        raise CorruptCheckpoint(f"{name} has {len(index.chunks)} checksums for {index.data_bytes} bytes")
    return index


def _unreadable(name: str, error: OSError) -> CorruptCheckpoint:
    if isinstance(error, FileNotFoundError):
        return CorruptCheckpoint(f"{name} is missing")
    return CorruptCheckpoint(f"{name} cannot be read: {error.strerror}")


def _whose(found: bytes, identity: Identity, rank: int) -> str:
    try:
        fields = json.loads(found[len(MAGIC) :].rstrip(b"\0"))
        its_rank = fields.pop("rank")
        fields.pop("version")
        foreign = identity.difference(Identity(**fields))
    except (ValueError, TypeError, KeyError, AttributeError):
        return "is altered: its header is not the one written"
    if foreign:
        return foreign
    return f"belongs to rank {its_rank}, not {rank}" if its_rank != rank else "is altered in its header"
