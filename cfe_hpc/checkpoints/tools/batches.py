"""Runs of tensors' elements in batches that fit into memory: what lies close together is read once, however small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cfe_hpc.checkpoints.layout import DTYPE_BYTES
from cfe_hpc.checkpoints.state.weights import Source
from cfe_hpc.checkpoints.tools.arithmetic import BATCH_BYTES

__all__ = ["Part", "batches", "read"]

_ALIGNED = 16  # of any item


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Elements of one tensor, and the bytes of a batch that they take.

    Attributes:
        start, count: elements.
        at: first byte in the batch.
    """

    source: Source
    dtype: str
    start: int
    count: int
    at: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return self.count * DTYPE_BYTES[self.dtype]


def batches(wanted: Iterable[tuple[Source, int, int]]) -> Iterator[list[Part]]:
    """Parts of at most BATCH_BYTES together, in the order of `wanted`: (tensor, first element, elements) each."""
    batch: list[Part] = []
    at = 0
    for source, start, count in wanted:
        dtype, _ = source.describe()
        low, end = start, start + count
        while low < end:
            number = min(end - low, (BATCH_BYTES - at) // DTYPE_BYTES[dtype])
            if number == 0:
                yield batch
                batch, at = [], 0
                continue
            batch.append(Part(source=source, dtype=dtype, start=low, count=number, at=at))
            low += number
            at = min(-(-(at + number * DTYPE_BYTES[dtype]) // _ALIGNED) * _ALIGNED, BATCH_BYTES)
    if batch:
        yield batch


def read(parts: Sequence[Part], memory: memoryview, sources: Sequence[Source] | None = None) -> None:
    """Fill `memory` with the elements of a batch, checked, in one pass over one checkpoint's files.

    Args:
        sources: read these in place of the parts' own: the same tensors of another checkpoint.

    Raises:
        CorruptCheckpoint: bytes are not those that were written.
    """
    sources = sources or [part.source for part in parts]
    for part, source in zip(parts, sources, strict=True):
        source.reader.enqueue(source.stored, part.start, memory[part.at : part.at + part.size_bytes])
    sources[0].reader.flush()
