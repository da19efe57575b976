"""How two checkpoints differ, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cfe_hpc.checkpoints.layout import CHUNK_BYTES, DTYPE_BYTES, Extent
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.state.weights import Source, shared
from cfe_hpc.checkpoints.tools.arithmetic import Arithmetic, Difference
from cfe_hpc.checkpoints.tools.batches import batches, read

__all__ = ["Changed", "Comparison", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A tensor that both have, with other bytes.

    Attributes:
        elements: of the whole tensor.
    """

    name: str
    dtype: str
    elements: int
    difference: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All of it.

    Attributes:
        only: names that one of them alone has: the first's, the second's.
        reshaped: (name, the first's dtype and shape, the second's) where these differ.
        equal: tensors that are the same, bit for bit.
        read_bytes: of each checkpoint: the rest was told equal by its checksums.
    """

    only: tuple[list[str], list[str]]
    reshaped: list[tuple[str, str, str]]
    changed: list[Changed]
    equal: int
    read_bytes: int


def compare(one: Opened, two: Opened, progress: Callable[[int], Any] = int) -> Comparison:
    """Compare two checkpoints, those of several ranks by whole tensors.

    Chunks of the same file that lie in the same place and have the same checksum are equal; all others are read.

    Args:
        progress: called with bytes, as many in all as the tensors take that both have.

    Raises:
        CorruptCheckpoint: bytes are not those that were written.
        CheckpointError: tensors differ, and there is no numpy to say how much.
    """
    ones, twos = _tensors(one), _tensors(two)
    both = [name for name in ones if name in twos]
    described = {name: (ones[name].describe(), twos[name].describe()) for name in both}
    alike = [name for name in both if described[name][0] == described[name][1]]
    untouched = _Untouched(one, two)
    wanted = [(ones[name], *run) for name in alike for run in untouched.rest(name, described[name][0])]
    open_bytes = sum(count * DTYPE_BYTES[source.describe()[0]] for source, _, count in wanted)
    progress(sum(math.prod(described[name][0][1]) * DTYPE_BYTES[described[name][0][0]] for name in alike) - open_bytes)
    found: dict[str, Difference] = {}
    with Arithmetic() as arithmetic:
        for parts in batches(wanted):
            read(parts, arithmetic.first)
            read(parts, arithmetic.second, [twos[part.source.name] for part in parts])
            for part in parts:
                name, difference = part.source.name, arithmetic.compare(part.dtype, part.count, part.at)
                found[name] = found.get(name, Difference()) + difference
                progress(part.size_bytes)
    changed = [
        Changed(name=name, dtype=described[name][0][0], elements=math.prod(described[name][0][1]), difference=each)
        for name, each in found.items()
        if each.differing
    ]
    reshaped = [(name, _spell(*described[name][0]), _spell(*described[name][1])) for name in both if name not in alike]
    return Comparison(
        only=([name for name in ones if name not in twos], [name for name in twos if name not in ones]),
        reshaped=reshaped,
        changed=changed,
        equal=len(both) - len(reshaped) - len(changed),
        read_bytes=open_bytes,
    )


def _spell(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _tensors(opened: Opened) -> Mapping[str, Source]:
    """All tensors by name; those of one rank's own say whose."""
    found = {source.name: source for source in shared(opened)}
    for rank in range(opened.world_size):
        reader = opened.own(rank)
        for name in reader.names():
            label = f"{name} (rank {rank}'s own)"
            found[label] = Source(name=label, reader=reader, stored=name)
    return found


class _Untouched:
    """What checksums tell: which chunks of equal extents are the same in both."""

    def __init__(self, one: Opened, two: Opened) -> None:
        self._same: dict[str, list[tuple[Extent, set[int]]]] = {}
        if one.world_size != two.world_size:
            return
        for left, right in zip(one.indexes(), two.indexes(), strict=True):
            sums = zip(left.chunks, right.chunks, strict=False)
            equal = {index for index, (mine, its) in enumerate(sums) if mine == its}
            for extent in set(left.shared) & set(right.shared):
                self._same.setdefault(extent.name, []).append((extent, equal))

    def rest(self, name: str, described: tuple[str, tuple[int, ...]]) -> Iterator[tuple[int, int]]:
        """(first element, elements) of what must be read, in order: all but the whole chunks known to be equal."""
        item_bytes, total, at = DTYPE_BYTES[described[0]], math.prod(described[1]), 0
        for extent, equal in sorted(self._same.get(name, ()), key=lambda held: held[0].start):
            for low, high in _runs(extent, equal, item_bytes):
                if low > at:
                    yield at, low - at
                at = max(at, high)
        if at < total:
            yield at, total - at


def _runs(extent: Extent, equal: set[int], item_bytes: int) -> Iterator[tuple[int, int]]:
    """Elements of an extent, from and to, that lie in equal chunks."""
    first, last = extent.offset // CHUNK_BYTES, (extent.offset + extent.size_bytes - 1) // CHUNK_BYTES
    for index in range(first, last + 1):
        if index in equal:
            low = max(index * CHUNK_BYTES, extent.offset)
            high = min((index + 1) * CHUNK_BYTES, extent.offset + extent.size_bytes)
            # An element never lies in two chunks: extents begin at multiples of 4096, and items divide that.
            yield (
                extent.start + (low - extent.offset) // item_bytes,
                extent.start + (high - extent.offset) // item_bytes,
            )
