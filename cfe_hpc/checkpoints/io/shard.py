"""Writing one rank's data file: large aligned writes around the page cache, several at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.io.staging import Chunks
from cfe_hpc.checkpoints.io.streaming import stream
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, CHUNK_BYTES
from cfe_hpc.checkpoints.manifest import VERSION, FileFacts, Identity
from cfe_hpc.errors import CheckpointError

__all__ = ["MAGIC", "NewFile", "data_facts", "header", "num_chunks", "write_data", "write_file"]

MAGIC = b"cfe_hpc shard data\n"


def header(identity: Identity, rank: int) -> bytes:
    """The first block of a data file: a magic line, a line of JSON that says whose it is, zeros.

    Raises:
        CheckpointError: the run id is too long for a block.
    """
    line = json.dumps({"version": VERSION, **asdict(identity), "rank": rank}).encode() + b"\n"
    block = (MAGIC + line).ljust(BLOCK_BYTES, b"\0")
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


class NewFile:
    """A new data file: its blocks are allocated, its bytes still to be written. One that is not written is closed."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Raises OSError, with `path` as its filename; there is no file then."""
        self.path = path
        with _named(path):
            self._fd = _open_direct(path, size_bytes)

    def write(self, source: Chunks) -> tuple[int, ...]:
        """Write it, past the page cache where the filesystem can do that; durable once `sync` has returned.

        Returns:
            crc32c of each chunk.

        Raises:
            OSError: with the path as its filename; the file is closed.
        """
        with self._in_use():
            return stream(self._fd, source)

    def sync(self) -> None:
        """Make what is written durable, and close it. Raises OSError, with the path as its filename."""
        with self._in_use():
            os.fsync(self._fd)
        self.close()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        try:
            with _named(self.path):
                yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave it as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_data(path: Path, source: Chunks) -> tuple[int, ...]:
    """Make a new data file and write it, durable on return; returns and raises as NewFile.write."""
    file = NewFile(path, source.size_bytes)
    sums = file.write(source)
    file.sync()
    return sums


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError of a file descriptor does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _open_direct(path: Path, size_bytes: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags & ~os.O_EXCL, 0o644)  # Linux makes the file before it refuses the flag
    try:
        _allocate(fd, size_bytes)
    except OSError:
        os.close(fd)
        os.unlink(path)
        raise
    return fd


def _allocate(fd: int, size_bytes: int) -> None:
    """Have the file's blocks, where the filesystem can do that: writes that extend a file wait for each other.

    os.posix_fallocate would write to every block of the other filesystems.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(size_bytes)) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        raise OSError(code, os.strerror(code))


def data_facts(size_bytes: int, chunks: Sequence[int]) -> FileFacts:
    """A data file as the manifest knows it."""
    return FileFacts(size_bytes=size_bytes, crc32c=crc32c(b"".join(value.to_bytes(4, "little") for value in chunks)))
