"""What checkpoints need of the world: pieces of tensors to write, and a group of ranks that act together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Fetch", "Group", "HostCopies", "OnDevice", "Piece", "ReadInto", "Sharded", "SoloGroup"]


class OnDevice(Protocol):
    """Bytes of a tensor in an accelerator's memory, which they keep until somebody has copied them."""

    @property
    def nbytes(self) -> int:
        """How many."""

    @property
    def device(self) -> Any:
        """The torch.device where they are."""

    def flat(self) -> Any:
        """A tensor of them, there: uint8, contiguous, one dimension. New memory if the tensor is not contiguous."""

    def copy_to(self, out: memoryview) -> None:
        """Copy them into writable memory of that size; all of them are there on return."""

    def on_host(self) -> memoryview:
        """A copy of them."""


Fetch = Callable[[Sequence[tuple[OnDevice, memoryview]]], Iterator[int]]
"""Copies what is on devices into memory of its size, in order; yields again and again how many are there by now."""


class HostCopies(Protocol):
    """Copies from an accelerator into memory of this process, while it computes. Any thread may call."""

    def pin(self, address: int, size_bytes: int) -> None:
        """Let the device write to this memory by itself, which begins at a page; its pages stay where they are.

        Raises:
            OSError: that is refused. Copies to it are correct all the same, and block.
        """

    def unpin(self, address: int) -> None:
        """Take `pin` back, before the memory is unmapped; returns when no copy is under way."""

    def boundary(self, devices: Iterable[Any]) -> Any:
        """A mark on each of these torch.devices behind all that this thread has given it to do."""

    def fetch(self, tasks: Sequence[tuple[OnDevice, memoryview]], after: Any) -> Iterator[int]:
        """As `Fetch`, beside what devices do otherwise, with the bytes that are there at the boundary `after` and as
        long as nobody writes to them. Nothing is under way any more when this ends, or raises.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of elements of one global tensor, held by this rank.

    Any rank layout is a set of pieces: a whole replicated tensor (start 0, all elements), a ZeRO partition (a
    flat interval), a row shard. Reading asks for intervals again, whatever layout wrote them.

    Attributes:
        name: global name, unique in the checkpoint, e.g. "model/blocks.0.attn.wq" or "exp_avg/blocks.0.attn.wq".
        dtype: torch's word without the prefix: "float32", "bfloat16", "int64", "uint8", "bool" …
        shape: global shape.
        start: first element of the piece, counted in the flattened (row-major) global tensor.
        data: the elements, little-endian, contiguous bytes, on the host or on a device. It may alias live memory:
            whoever keeps it beyond the call that it was passed to must copy it.
        steady: the bytes change only inside the step of a tracked torch optimizer (parameters in its groups, its
            state; ZeRO's masters and moments): they may be copied until then.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    data: memoryview | OnDevice
    steady: bool = False


class ReadInto(Protocol):
    """Fills memory from a checkpoint, whichever ranks wrote the bytes."""

    def names(self) -> Sequence[str]:
        """Global tensor names in the checkpoint, sorted."""

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, global shape) of a tensor. Raises CheckpointMismatch when it is not in the checkpoint."""

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` (writable contiguous bytes) with the elements from `start` on of the flattened tensor.

        Raises:
            CheckpointMismatch: no such tensor, or the interval goes beyond it.
            CorruptCheckpoint: the bytes are not those that were written.
        """

    def enqueue(self, name: str, start: int, out: memoryview) -> None:
        """Ask for what `read_into` would do; `out` has the elements when `flush` returns.

        Raises:
            CheckpointMismatch: as `read_into`.
        """

    def flush(self, *, alike: bool = False) -> None:
        """Do all that was asked for: each byte is read once, in file order, and checked on its way. Not collective.

        Args:
            alike: whether the other ranks read the same bytes at this time; where ranks of one node cannot share what
                they read, the page cache then serves them. Otherwise reads go around it.

        Raises:
            CorruptCheckpoint: bytes are not those that were written; what was asked for may be filled in part.
        """


class Sharded(Protocol):
    """An object that knows how to lay its own state out in pieces (a DeepSpeed engine's adapter, say).

    Objects without these methods are taken by their state_dict / load_state_dict.

    Either kind may say beforehand what it would refuse, for all mismatches to be told before anything is loaded: a
    Sharded object by `check_checkpoint_state(reader, tree)`, any other by `check_state_dict(state)`. Both are called
    on every rank, yield a phrase for each mismatch, and find a `checkpoints.codec.TensorRef` (name, dtype, shape)
    where the state has a tensor. They read no bytes and enter no collectives.
    """

    def checkpoint_layout(self) -> dict[str, Any]:
        """What must agree between checkpoint and job, as JSON: engine kind, zero_stage, precision, variant …"""

    def checkpoint_state(self) -> tuple[Iterable[Piece], Any]:
        """This rank's pieces, and a tree for everything that is no large tensor (plain Python values and small
        tensors; see checkpoints.codec). Every rank calls it; it may enter collectives. Names are the object's own:
        in the checkpoint they follow its tracked name, and its reader takes that off again."""

    def load_checkpoint_state(self, reader: ReadInto, tree: Any) -> None:
        """Take the state back. Every rank calls it with the tree that this rank (or, at another world size,
        rank 0) saved; it may enter collectives. A restore's reader therefore raises no CorruptCheckpoint, which one
        rank alone may meet: the restore raises it on all of them when this has returned."""


class Group(Protocol):
    """Ranks that act together. Every method is collective: all ranks call it, in the same order."""

    rank: int
    size: int

    def all_max(self, values: Sequence[int]) -> list[int]:
        """Element-wise maximum over ranks of 64-bit integers; the cheapest of these calls."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes (lengths may differ), by rank, on every rank."""

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        """The source's bytes on every rank; the others' argument is ignored."""

    def barrier(self) -> None:
        """Return when every rank has called."""


class SoloGroup:
    """The group of one: a run of a single rank needs no collectives, and no torch."""

    rank = 0
    size = 1

    def all_max(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data]

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        return data

    def barrier(self) -> None:
        return None


Fault = Callable[[str], None]
"""Called with the name of each moment of a save ("shard-written", "before-commit" …); tests die there."""
