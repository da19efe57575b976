"""Shards on their way from one place to another: out of a folder of another tier, or out of a stream."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from cfe_hpc.checkpoints.io.shard import write_data, write_file
from cfe_hpc.checkpoints.io.shard_reader import ShardReader, fill, read_index
from cfe_hpc.checkpoints.manifest import Manifest, data_name, index_name
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint

__all__ = ["InOrder", "copy_shard"]


def _nothing() -> None:
    pass


def copy_shard(folder: Path, draft: Path, rank: int, manifest: Manifest, beat: Callable[[], None] = _nothing) -> None:
    """Copy one shard from a node's folder into a draft; durable on return, every byte as it was written.

    Args:
        beat: called when the draft is ready for more.

    Raises:
        CorruptCheckpoint: the node's copy is not what was written.
        OSError: naming the file that could not be written.
    """
    facts, content = manifest.files, read_index(folder, rank)
    shard = ShardReader([folder], rank, manifest.identity, facts[index_name(rank)], content)
    shard.check_header(facts[data_name(rank)])
    with open(folder / data_name(rank), "rb", buffering=0) as stream:
        sums = write_data(draft / data_name(rank), _Copied(stream.fileno(), shard.index.data_bytes, shard.name, beat))
    if sums != shard.index.chunks:
        raise CorruptCheckpoint(f"{folder}: {data_name(rank)} is altered")
    write_file(draft / index_name(rank), content)


class _Copied:
    """A node's data file; a `Chunks`. Whoever writes it sums it: it is not summed here as well."""

    def __init__(self, fd: int, size_bytes: int, name: str, beat: Callable[[], None]) -> None:
        self.size_bytes, self._fd, self._name, self._beat = size_bytes, fd, name, beat

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        self._beat()
        fill(self._fd, start, buffer, self._name)
        os.posix_fadvise(self._fd, start, len(buffer), os.POSIX_FADV_DONTNEED)  # nobody reads it again soon
        return buffer


class InOrder:
    """A `Chunks` whose bytes can only be had one after the other, whichever thread asks for which."""

    def __init__(self, size_bytes: int, fill: Callable[[memoryview], None]) -> None:
        """`fill` fills a buffer with the bytes that follow those of its last call; it may raise anything."""
        self.size_bytes, self._fill = size_bytes, fill
        self._at = 0
        self._broken = False
        self._turn = threading.Condition()

    def chunk(self, start: int, buffer: memoryview) -> memoryview:
        """See Chunks.chunk. Chunks before this one must have been asked for, too."""
        with self._turn:
            self._turn.wait_for(lambda: self._at == start or self._broken)
            if self._broken:
                raise CheckpointError("what comes before this chunk could not be read")
            self._broken = True
            try:
                self._fill(buffer)
                self._broken, self._at = False, start + len(buffer)
            finally:
                self._turn.notify_all()
        return buffer
