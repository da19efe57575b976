"""Writing one rank's data file, and reading verified bytes of any rank's back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, CHUNK_BYTES
from cfe_hpc.checkpoints.manifest import VERSION, FileFacts, Identity, ShardIndex, data_name, index_name
from cfe_hpc.checkpoints.staging import Chunks
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint

__all__ = ["ShardReader", "data_facts", "header", "num_chunks", "write_data", "write_file"]

_MAGIC = b"cfe_hpc shard data\n"
_KEPT_CHUNKS = 4


def header(identity: Identity, rank: int) -> bytes:
    """The first block of a data file: a magic line, a line of JSON that says whose it is, zeros.

    Raises:
        CheckpointError: the run id is too long for a block.
    """
    line = json.dumps({"version": VERSION, **asdict(identity), "rank": rank}).encode() + b"\n"
    block = (_MAGIC + line).ljust(BLOCK_BYTES, b"\0")
    if len(block) > BLOCK_BYTES:
        raise CheckpointError(f"the run id is too long for a shard's header ({len(identity.run_id)} characters)")
    return block


def num_chunks(size_bytes: int) -> int:
    """Chunks of a data file."""
    return -(-size_bytes // CHUNK_BYTES)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file; its bytes are durable on return.

    Raises:
        OSError: with `path` as its filename.
    """
    with _named(path), open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_data(path: Path, source: Chunks) -> tuple[int, ...]:
    """Write a new data file, durable on return; it bypasses the page cache where the filesystem can do that.

    While one chunk is written, the next is fetched and summed.

    Returns:
        crc32c of each chunk.

    Raises:
        OSError: with `path` as its filename.
    """
    with _named(path):
        fd = _open_direct(path)
        try:
            sums = _stream(fd, source)
            os.fsync(fd)
        finally:
            os.close(fd)
    return sums


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError of a file descriptor does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags & ~os.O_EXCL, 0o644)  # Linux makes the file before it refuses the flag


def _stream(fd: int, source: Chunks) -> tuple[int, ...]:
    buffer_bytes = min(CHUNK_BYTES, source.size_bytes)
    buffers = [memoryview(mmap.mmap(-1, buffer_bytes)) for _ in range(2)]  # page-aligned, as O_DIRECT asks
    sums: list[int] = []
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, "checkpoint-writer") as writer:
        for index in range(num_chunks(source.size_bytes)):
            start = index * CHUNK_BYTES
            buffer = buffers[index % 2][: min(CHUNK_BYTES, source.size_bytes - start)]
            chunk = source.chunk(start, buffer)
            sums.append(crc32c(chunk))
            if writing is not None:
                writing.result()
            writing = writer.submit(_write_all, fd, chunk, start)
        if writing is not None:
            writing.result()
    return tuple(sums)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        try:
            written = os.pwrite(fd, data, offset)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        data, offset = data[written:], offset + written


def data_facts(size_bytes: int, chunks: Sequence[int]) -> FileFacts:
    """A data file as the manifest knows it."""
    return FileFacts(size_bytes=size_bytes, crc32c=crc32c(b"".join(value.to_bytes(4, "little") for value in chunks)))


class ShardReader:
    """Bytes of one rank's data file, each chunk checked before any of it is handed out.

    Opening reads the index file; data files are opened for each read, so that thousands of shards need no
    thousands of file descriptors.
    """

    def __init__(self, folder: Path, rank: int, identity: Identity, facts: FileFacts) -> None:
        """Read and check the index.

        Args:
            identity: the manifest's.
            facts: the index file's, from the manifest.

        Raises:
            CorruptCheckpoint: the index is missing, altered, or of another save.
        """
        self.rank = rank
        self.path = folder / data_name(rank)
        name = index_name(rank)
        content = _read_file(folder / name)
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
        self.index = index
        self._kept: OrderedDict[int, bytearray] = OrderedDict()

    def check_header(self, expected: FileFacts) -> None:
        """Check the data file's size and whose it is. Raises CorruptCheckpoint."""
        name = self.path.name
        try:
            size_bytes = self.path.stat().st_size
            with open(self.path, "rb") as stream:
                found = stream.read(BLOCK_BYTES)
        except OSError as error:
            raise _unreadable(name, error) from error
        if found != header(self.index.identity, self.rank):
            raise CorruptCheckpoint(f"{name} {_whose(found, self.index.identity, self.rank)}")
        if size_bytes != expected.size_bytes or size_bytes != self.index.data_bytes:
            verb = "is truncated" if size_bytes < expected.size_bytes else "has grown"
            raise CorruptCheckpoint(f"{name} {verb}: {size_bytes} bytes instead of {expected.size_bytes}")

    def check_chunk(self, index: int, scratch: memoryview) -> None:
        """Read one chunk into `scratch`, of CHUNK_BYTES, and compare it with its checksum. Raises CorruptCheckpoint."""
        start, size_bytes = self._bounds(index)
        self._read_checked(index, start, scratch[:size_bytes])

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from the data file's byte `offset` on. Raises CorruptCheckpoint."""
        done = 0
        while done < len(out):
            index = (offset + done) // CHUNK_BYTES
            start, size_bytes = self._bounds(index)
            skip = offset + done - start
            take = min(size_bytes - skip, len(out) - done)
            if take <= 0:
                raise CorruptCheckpoint(f"{self.path.name} ends before byte {offset + len(out)}")
            part = out[done : done + take]
            if take == size_bytes:
                self._read_checked(index, start, part)
            else:
                part[:] = self._chunk(index)[skip : skip + take]
            done += take

    def _bounds(self, index: int) -> tuple[int, int]:
        start = index * CHUNK_BYTES
        return start, min(CHUNK_BYTES, self.index.data_bytes - start)

    def _chunk(self, index: int) -> memoryview:
        kept = self._kept.pop(index, None)
        if kept is None:
            start, size_bytes = self._bounds(index)
            kept = bytearray(size_bytes)
            self._read_checked(index, start, memoryview(kept))
        self._kept[index] = kept
        if len(self._kept) > _KEPT_CHUNKS:
            self._kept.popitem(last=False)
        return memoryview(kept)

    def _read_checked(self, index: int, start: int, out: memoryview) -> None:
        name = self.path.name
        try:
            with open(self.path, "rb", buffering=0) as stream:
                done = 0
                while done < len(out):
                    got = os.preadv(stream.fileno(), [out[done:]], start + done)
                    if not got:
                        raise CorruptCheckpoint(f"{name} is truncated: it ends before byte {start + len(out)}")
                    done += got
        except OSError as error:
            raise _unreadable(name, error) from error
        if crc32c(out) != self.index.chunks[index]:
            raise CorruptCheckpoint(
                f"{name} is altered: bytes {start} to {start + len(out)} differ from their checksum"
            )


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path.name, error) from error


def _unreadable(name: str, error: OSError) -> CorruptCheckpoint:
    if isinstance(error, FileNotFoundError):
        return CorruptCheckpoint(f"{name} is missing")
    return CorruptCheckpoint(f"{name} cannot be read: {error.strerror}")


def _whose(found: bytes, identity: Identity, rank: int) -> str:
    try:
        fields = json.loads(found[len(_MAGIC) :].rstrip(b"\0"))
        its_rank = fields.pop("rank")
        fields.pop("version")
        foreign = identity.difference(Identity(**fields))
    except (ValueError, TypeError, KeyError, AttributeError):
        return "is altered: its header is not the one written"
    if foreign:
        return foreign
    return f"belongs to rank {its_rank}, not {rank}" if its_rank != rank else "is altered in its header"
