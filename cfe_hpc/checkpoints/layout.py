"""Where bytes go: extents of a shard's data file, and how work is divided among ranks. Pure arithmetic.

A shard's data file is a header of one block, then each piece from a block boundary on, then zeros to the end of
the last block. Blocks are 4 KiB, so that the file can be written around the page cache; checksums are taken over
chunks of 8 MiB of the whole file, header and padding included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cfe_hpc.checkpoints.protocols import Piece
from cfe_hpc.errors import CheckpointError

__all__ = ["BLOCK_BYTES", "CHUNK_BYTES", "DTYPE_BYTES", "SLICE_BYTES", "Extent", "Placement", "divide", "place"]

BLOCK_BYTES = 4096
CHUNK_BYTES = 8 << 20
SLICE_BYTES = 2 << 20
"""A chunk is copied, summed and moved to or from the disk in slices, which stay in a core's cache for all of these."""

DTYPE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A run of elements of one tensor and where its bytes lie in a shard's data file.

    Attributes:
        name: the tensor's name; unique among shared tensors of the checkpoint, or among one rank's own.
        dtype: a key of DTYPE_BYTES.
        shape: global shape.
        start: first element, counted in the flattened (row-major) tensor.
        count: elements.
        offset: first byte in the data file; a multiple of BLOCK_BYTES.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    count: int
    offset: int

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.count

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return self.count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The layout of one data file: an extent for each piece, in their order, and the file's size."""

    extents: tuple[Extent, ...]
    size_bytes: int


def place(pieces: Iterable[Piece]) -> Placement:
    """Lay pieces out behind the header block, each from a block boundary on.

    Raises:
        CheckpointError: a piece's dtype is unknown, or its bytes do not fit its dtype, shape and start.
    """
    extents, offset = [], BLOCK_BYTES
    for piece in pieces:
        extent = _extent(piece, offset)
        extents.append(extent)
        offset += _blocks(extent.size_bytes)
    return Placement(extents=tuple(extents), size_bytes=offset)


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _extent(piece: Piece, offset: int) -> Extent:
    item_bytes = DTYPE_BYTES.get(piece.dtype)
    if item_bytes is None:
        raise CheckpointError(f"tensor {piece.name}: dtype {piece.dtype} cannot be stored")
    count, rest = divmod(piece.data.nbytes, item_bytes)
    if rest or not 0 <= piece.start <= piece.start + count <= math.prod(piece.shape):
        raise CheckpointError(
            f"tensor {piece.name}: {piece.data.nbytes} bytes from element {piece.start} on are no interval of "
            f"{piece.dtype} {list(piece.shape)}"
        )
    return Extent(
        name=piece.name, dtype=piece.dtype, shape=tuple(piece.shape), start=piece.start, count=count, offset=offset
    )


def divide(tensors: Sequence[tuple[str, tuple[int, ...]]], part: int, parts: int) -> list[tuple[int, int, int]]:
    """One part's share of tensors that every rank holds: intervals of about equal bytes over all parts.

    The tensors are laid on one line in their order, and the line is cut at equal distances; a cut moves down to a
    block boundary within its tensor, so that no tensor below a block is cut.

    Args:
        tensors: (dtype, shape) of each.

    Returns:
        (index of the tensor, first element, elements) of each interval, in order. Over all parts each element
        is there exactly once; a tensor without elements goes to part 0.
    """
    sizes = [math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in tensors]
    total = sum(sizes)
    low, high = total * part // parts, total * (part + 1) // parts
    share, base = [], 0
    for index, size in enumerate(sizes):
        first, last = _cut(low - base, size), _cut(high - base, size)
        if last > first or (size == 0 and part == 0):
            item_bytes = DTYPE_BYTES[tensors[index][0]]
            share.append((index, first // item_bytes, (last - first) // item_bytes))
        base += size
    return share


def _cut(position: int, size: int) -> int:
    if position >= size:
        return size
    return max(position, 0) // BLOCK_BYTES * BLOCK_BYTES
