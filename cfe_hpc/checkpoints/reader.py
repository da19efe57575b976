"""Reading a checkpoint: any interval of any tensor, assembled from whichever shards hold it. No torch, no numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.folders import step_name
from cfe_hpc.checkpoints.io.neighbours import Neighbours
from cfe_hpc.checkpoints.io.reads import Batch, Chunk, read_all, read_shared
from cfe_hpc.checkpoints.io.shard import num_chunks
from cfe_hpc.checkpoints.io.shard_reader import ShardReader, read_index
from cfe_hpc.checkpoints.layout import DTYPE_BYTES, Extent
from cfe_hpc.checkpoints.manifest import MANIFEST, Manifest, ShardIndex, data_name, index_name
from cfe_hpc.errors import CheckpointMismatch, CorruptCheckpoint

__all__ = ["Opened", "OwnReader", "SharedReader", "read_manifest"]


def read_manifest(folder: Path, run_id: str | None = None) -> Manifest:
    """The manifest of a committed folder, checked against its own checksum, the folder's name and the run.

    Raises:
        CorruptCheckpoint: it is missing, empty, altered, or another run's or step's.
    """
    return parse_manifest(read_manifest_bytes(folder), folder.name, run_id)


def read_manifest_bytes(folder: Path) -> bytes:
    """The manifest file, unchecked. Raises CorruptCheckpoint when it is missing or unreadable."""
    try:
        return (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{MANIFEST} is missing: the save was not committed") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{MANIFEST} cannot be read: {error.strerror}") from error


def parse_manifest(content: bytes, folder_name: str, run_id: str | None) -> Manifest:
    """`read_manifest` of bytes that are there already."""
    manifest = Manifest.unseal(content)
    identity = manifest.identity
    if step_name(identity.step) != folder_name:
        raise CorruptCheckpoint(f"{MANIFEST} belongs to step {identity.step}, not to the folder {folder_name}")
    if run_id is not None and identity.run_id != run_id:
        raise CorruptCheckpoint(f"{MANIFEST} belongs to run {identity.run_id}, not {run_id}")
    wanted = {name(rank) for rank in range(identity.world_size) for name in (data_name, index_name)}
    if wanted != manifest.files.keys():
        raise CorruptCheckpoint(f"{MANIFEST} does not list the files of {identity.world_size} ranks")
    return manifest


class Opened:
    """A checkpoint whose manifest and indexes are read and fit together.

    The tensors' bytes are checked as they are read; `verify` checks them all.

    Attributes:
        folder: where it lies.
        manifest: what it consists of.
        reader: tensors that belong to the checkpoint as a whole.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        indexes: Sequence[bytes] | None = None,
        places: Callable[[int], Sequence[Path]] | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Check every shard's index.

        Args:
            indexes: the index files by rank; read from `folder` when left out.
            places: folders with a copy of a rank's data file, the nearest first; `folder` alone when left out.
            part: this reader's number of `parts` that read at the same time, in this process and in others.

        Raises:
            CorruptCheckpoint: an index is missing, altered or foreign, or the shards leave a gap in a tensor.
        """
        self.folder = folder
        self.manifest = manifest
        self._part, self._parts = part, parts
        identity = manifest.identity
        if indexes is None:
            indexes = [read_index(folder, rank) for rank in range(identity.world_size)]
        self._shards = [
            ShardReader(
                places(rank) if places else (folder,), rank, identity, manifest.files[index_name(rank)], indexes[rank]
            )
            for rank in range(identity.world_size)
        ]
        counts = [num_chunks(shard.index.data_bytes) for shard in self._shards]
        self._first_chunks = [0, *itertools.accumulate(counts)]
        self._batch = Batch()
        self._neighbours: Neighbours | None = None
        self.reader = SharedReader(self._shards, self)

    @classmethod
    def at(cls, folder: Path, run_id: str | None = None) -> Opened:
        """Open a committed folder. Raises CorruptCheckpoint."""
        return cls(folder, read_manifest(folder, run_id))

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return self.manifest.identity.step

    @property
    def world_size(self) -> int:
        """Ranks that saved it."""
        return self.manifest.identity.world_size

    def indexes(self) -> list[ShardIndex]:
        """What each rank saved, and where in its data file."""
        return [shard.index for shard in self._shards]

    @property
    def faults(self) -> list[str]:
        """Why copies of shards were left out, a line each, so far."""
        return [fault for shard in self._shards for fault in shard.faults]

    def saved_by(self, rank: int) -> int:
        """Whose state `rank` takes: its own where it was there at the save, else rank 0's."""
        return rank if rank < self.world_size else 0

    def state(self, rank: int) -> Any:
        """The tree that `saved_by(rank)` saved, as JSON."""
        return self._shards[self.saved_by(rank)].index.state

    def own(self, rank: int) -> OwnReader:
        """The tensors that `saved_by(rank)` saved for itself."""
        return OwnReader(self._shards[self.saved_by(rank)], self)

    def enqueue(self, shard: ShardReader, offset: int, out: memoryview) -> None:
        """See ReadInto.enqueue: for the readers of this checkpoint."""
        self._batch.add(shard, offset, out)

    def flush(self, *, alike: bool = False) -> None:
        """See ReadInto.flush: for all readers of this checkpoint together."""
        chunks, self._batch = self._batch.chunks(), Batch()
        if not chunks:
            return
        board = None if self._neighbours is None else self._neighbours.board
        if board is not None:
            read_shared({self._first_chunks[chunk.shard.rank] + chunk.index: chunk for chunk in chunks}, board)
            return
        if alike and self._parts > 1:
            # Each begins elsewhere: one reads from the disk what the others then find in the page cache.
            first = len(chunks) * self._part // self._parts
            chunks = chunks[first:] + chunks[:first]
        read_all(chunks, direct=not alike or self._parts == 1)

    def offer(self) -> bytes:
        """Begin to share reads with other ranks of this node: what `meet` must hear from each rank."""
        self._neighbours = Neighbours()
        return self._neighbours.offer()

    def meet(self, offers: Sequence[bytes], rank: int) -> None:
        """Find those that are near, among all ranks' `offers`. Not collective; see Neighbours.meet."""
        assert self._neighbours is not None
        self._neighbours.meet(offers, rank, self._first_chunks[-1])

    def part(self) -> None:
        """End the sharing, when all have met."""
        if self._neighbours is not None:
            self._neighbours.close()
            self._neighbours = None

    def check_headers(self) -> None:
        """Check this part's share of the data files: their sizes, and whose they are.

        Raises:
            CorruptCheckpoint: the first that is not as it was written.
        """
        for shard in self._shards[self._part :: self._parts]:
            shard.check_header(self.manifest.files[shard.name])

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read this part's share of all data and compare it with the checksums.

        Args:
            progress: called with the bytes of each chunk that is good, from any thread.

        Raises:
            CorruptCheckpoint: the first difference found.
        """
        chunks = [
            Chunk(shard=shard, index=index)
            for shard in self._shards
            for index in range(num_chunks(shard.index.data_bytes))
        ]
        low, high = (len(chunks) * part // self._parts for part in (self._part, self._part + 1))
        for shard in {chunk.shard: None for chunk in chunks[low:high]}:
            shard.check_header(self.manifest.files[shard.name])
        read_all(chunks[low:high], direct=True, progress=progress)


class SharedReader:
    """The tensors of the whole checkpoint; a ReadInto."""

    def __init__(self, shards: Sequence[ShardReader], opened: Opened) -> None:
        """Raises CorruptCheckpoint when shards disagree about a tensor, or leave a gap in one."""
        self._opened = opened
        self._extents: dict[str, list[tuple[Extent, ShardReader]]] = {}
        for shard in shards:
            for extent in shard.index.shared:
                self._extents.setdefault(extent.name, []).append((extent, shard))
        for name, held in self._extents.items():
            held.sort(key=lambda pair: (pair[0].start, -pair[0].count))
            _check_cover(name, [extent for extent, _ in held])

    def names(self) -> Sequence[str]:
        """Tensor names, sorted."""
        return sorted(self._extents)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape). Raises CheckpointMismatch when there is no such tensor."""
        extent = self._held(name)[0][0]
        return extent.dtype, extent.shape

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """See ReadInto.read_into."""
        for shard, offset, part in self._stretches(name, start, out):
            shard.read(offset, part)

    def enqueue(self, name: str, start: int, out: memoryview) -> None:
        """See ReadInto.enqueue."""
        for shard, offset, part in self._stretches(name, start, out):
            self._opened.enqueue(shard, offset, part)

    def flush(self, *, alike: bool = False) -> None:
        """See ReadInto.flush."""
        self._opened.flush(alike=alike)

    def _stretches(self, name: str, start: int, out: memoryview) -> Iterator[tuple[ShardReader, int, memoryview]]:
        """Where the elements from `start` on lie, in data files, and which part of `out` is whose."""
        held = self._held(name)
        item_bytes, total = DTYPE_BYTES[held[0][0].dtype], math.prod(held[0][0].shape)
        view = out.cast("B") if out.nbytes else out
        count, rest = divmod(out.nbytes, item_bytes)
        if rest or start < 0 or start + count > total:
            raise CheckpointMismatch(f"tensor {name} has {total} elements; {start} to {start + count} were asked for")
        at = start
        for extent, shard in held:
            if at >= start + count:
                break
            if extent.end <= at:
                continue
            take = min(extent.end, start + count) - at
            low = (at - start) * item_bytes
            yield shard, extent.offset + (at - extent.start) * item_bytes, view[low : low + take * item_bytes]
            at += take

    def _held(self, name: str) -> list[tuple[Extent, ShardReader]]:
        try:
            return self._extents[name]
        except KeyError:
            raise CheckpointMismatch(f"the checkpoint has no tensor {name}") from None


def _check_cover(name: str, extents: Sequence[Extent]) -> None:
    first, at = extents[0], 0
    for extent in extents:
        if (extent.dtype, extent.shape) != (first.dtype, first.shape):
            raise CorruptCheckpoint(
                f"shards disagree about tensor {name}: {first.dtype} {list(first.shape)} and "
                f"{extent.dtype} {list(extent.shape)}"
            )
        if extent.start > at:
            break
        at = max(at, extent.end)
    if at < math.prod(first.shape):
        raise CorruptCheckpoint(f"tensor {name}: no shard holds element {at}")


class OwnReader:
    """Tensors that one rank saved for itself, each whole; a ReadInto."""

    def __init__(self, shard: ShardReader, opened: Opened) -> None:
        self._shard, self._opened = shard, opened
        self._extents = {extent.name: extent for extent in shard.index.own}

    def names(self) -> Sequence[str]:
        """Tensor names, sorted."""
        return sorted(self._extents)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape). Raises CheckpointMismatch when there is no such tensor."""
        extent = self._find(name)
        return extent.dtype, extent.shape

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """See ReadInto.read_into."""
        offset = self._offset(name, start, out)
        if out.nbytes:
            self._shard.read(offset, out.cast("B"))

    def enqueue(self, name: str, start: int, out: memoryview) -> None:
        """See ReadInto.enqueue."""
        offset = self._offset(name, start, out)
        if out.nbytes:
            self._opened.enqueue(self._shard, offset, out.cast("B"))

    def flush(self, *, alike: bool = False) -> None:
        """See ReadInto.flush."""
        self._opened.flush(alike=alike)

    def _offset(self, name: str, start: int, out: memoryview) -> int:
        extent = self._find(name)
        item_bytes = DTYPE_BYTES[extent.dtype]
        if start < 0 or start * item_bytes + out.nbytes > extent.size_bytes:
            raise CheckpointMismatch(f"tensor {name} has {extent.count} elements; more were asked for")
        return extent.offset + start * item_bytes

    def _find(self, name: str) -> Extent:
        try:
            return self._extents[name]
        except KeyError:
            raise CheckpointMismatch(f"rank {self._shard.rank} saved no tensor {name} of its own") from None
