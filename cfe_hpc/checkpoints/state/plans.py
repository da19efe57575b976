"""Which bytes of which tensors a rank saves, kept from one save to the next.

A plan holds for a capture when each object has the same tensors under the same paths, with the same dtype, shape,
device, kind and ties; when what training promises of tensors (see contracts) is the same; and when what depends on
such a promise is the very memory that it was. All of that is looked at anew each time, and ranks agree on it. What is
no tensor is not planned: it is read anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cfe_hpc.checkpoints import codec
from cfe_hpc.checkpoints.checksum import crc32c, crc32c_of
from cfe_hpc.checkpoints.layout import BLOCK_BYTES
from cfe_hpc.checkpoints.protocols import OnDevice, Piece
from cfe_hpc.checkpoints.state.contracts import Contracts, unchanged_since
from cfe_hpc.checkpoints.state.dtensors import is_dtensor, local_part
from cfe_hpc.checkpoints.state.tensors import aliases, borrowed, digests, tensor_bytes, tensor_data
from cfe_hpc.checkpoints.store import Content

__all__ = ["Captured", "Part", "Plan"]

_WORD_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One object's state at a boundary: its entry in the state tree, with its tensors, and the pieces that it laid out
    itself."""

    name: str
    entry: dict[str, Any]
    encoded: codec.Encoded
    pieces: tuple[Piece, ...] = ()
    layout: Any = None

    @property
    def kind(self) -> str:
        """As kinds.kind_of says, or "rng"."""
        kind: str = self.entry["kind"]
        return kind

    @property
    def tensors(self) -> dict[str, Any]:
        """By name."""
        return self.encoded.tensors

    @property
    def sightings(self) -> dict[str, codec.Sighting]:
        """By path."""
        return self.encoded.sightings

    @cached_property
    def facts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each tensor."""
        nodes = (node["tensor"] for _, node in self.sightings.values())
        return {node["name"]: (node["dtype"], tuple(node["shape"])) for node in nodes}


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a tensor that this rank writes.

    Attributes:
        start: the first, counted in the whole flattened tensor.
        offset: the first, counted in what this rank holds of it, flattened.
        count: how many; None for all.
    """

    name: str
    start: int
    offset: int
    count: int | None


class Plan:
    """One rank's part of checkpoints of the same objects.

    Attributes:
        contracts: what training promised when it was made.
        sightings: of each object's tensors, by the object's name.
    """

    def __init__(
        self,
        captured: Sequence[Captured],
        contracts: Contracts,
        *,
        parts: Sequence[Part],
        own: Sequence[str],
        trusted: set[str],
        compared: Sequence[str],
    ) -> None:
        """
        Args:
            parts: of tensors of the checkpoint as a whole; the pieces that objects laid out themselves come before.
            own: tensors of this rank alone.
            trusted: tensors that every rank holds alike, by `contracts`.
            compared: tensors of which ranks compare bytes at each save: both ends of trusted ones, all of others.
        """
        self.contracts = contracts
        self.sightings = {each.name: each.sightings for each in captured}
        self._kinds = [(each.name, each.kind) for each in captured]
        self._laid_out = [(each.name, [_form(piece) for piece in each.pieces]) for each in captured]
        self._facts = {name: found for each in captured for name, found in each.facts.items()}
        self._steady = {
            name
            for each in captured
            for name, tensor in each.tensors.items()
            if contracts.is_steady(name, each.kind, tensor)
        }
        self._trusted, self._compared = trusted, compared
        tensors = {name: tensor for each in captured for name, tensor in each.tensors.items()}
        # Memory that a contract fixes: as long as the plan holds, a view of it needs no making.
        self._lasting = {name for name in self._steady | trusted if aliases(_held(tensors[name]))}
        self._parts = [self._planned(part, tensors) for part in parts]
        self._own = [self._planned(Part(name, 0, 0, None), tensors) for name in own]
        self._ends = [
            end
            for name in compared
            if name in self._lasting and name in trusted
            for view in [borrowed(tensor_bytes(tensors[name]))]
            for end in (view[:BLOCK_BYTES], view[-BLOCK_BYTES:])
        ]
        self._summed = [name for name in compared if not (name in self._lasting and name in trusted)]
        self._form = object()

    def _planned(self, part: Part, tensors: Mapping[str, Any]) -> Part | Piece:
        """A part's piece, where that is always the same; it does not keep its memory."""
        if part.name not in self._lasting:
            return part
        piece = self._piece(part, tensors)
        assert isinstance(piece.data, memoryview)
        return _with(piece, piece.name, borrowed(piece.data))

    def content(self, captured: Sequence[Captured], contracts: Contracts, facts: Mapping[str, Any]) -> Content | None:
        """What this rank saves; None when the plan does not hold for what was captured."""
        if contracts != self.contracts or not self._holds(captured):
            return None
        tensors = {name: tensor for each in captured for name, tensor in each.tensors.items()}
        own = [self._made(part, tensors) for part in self._own]
        return Content(
            pieces=[*_named(captured), *(self._made(part, tensors) for part in self._parts)],
            own=own,
            state={each.name: each.entry for each in captured},
            layout={
                "facts": dict(facts),
                "objects": {each.name: each.layout for each in captured if each.layout is not None},
            },
            unchanged=unchanged_since([tensors[name] for name in self._steady]),
            form=self._form,
            holds=tensors,
        )

    def _holds(self, captured: Sequence[Captured]) -> bool:
        return (
            [(each.name, each.kind) for each in captured] == self._kinds
            and all(self._like(each) for each in captured)
            and [(each.name, [_form(piece) for piece in each.pieces]) for each in captured] == self._laid_out
        )

    def _like(self, captured: Captured) -> bool:
        """Whether an object's tensors are those of the plan."""
        known, found = self.sightings[captured.name], captured.sightings
        if list(known) != list(found):
            return False
        # What is the same memory has the same JSON object: see codec.Encoded.
        moved = [path for path, (_, node) in found.items() if node is not known[path][1]]
        return all(found[path][1] == known[path][1] and self._may_move(captured, found[path][1]) for path in moved)

    def _may_move(self, captured: Captured, node: Mapping[str, Any]) -> bool:
        """Whether no contract is about the memory where a tensor was or is."""
        name, contracts = node["tensor"]["name"], self.contracts
        tensor = captured.tensors[name]
        return not (
            name in self._steady
            or name in self._trusted
            or contracts.is_steady(name, captured.kind, tensor)
            or contracts.is_replicated(captured.name, captured.kind, tensor)
        )

    def _made(self, part: Part | Piece, tensors: Mapping[str, Any]) -> Piece:
        return part if type(part) is Piece else self._piece(part, tensors)  # type: ignore[arg-type]

    def _piece(self, part: Part, tensors: Mapping[str, Any]) -> Piece:
        dtype, shape = self._facts[part.name]
        data = tensor_data(_held(tensors[part.name]), part.offset, part.count)
        steady = part.name in self._steady
        return Piece(name=part.name, dtype=dtype, shape=shape, start=part.start, data=data, steady=steady)

    def digest(self, captured: Sequence[Captured]) -> int:
        """A number below 2 ** 62 of the bytes that every rank is to hold alike, by which they tell whether they do."""
        tensors = {name: tensor for each in captured for name, tensor in each.tensors.items()}
        sums = digests([(tensors[name], name not in self._trusted) for name in self._summed])
        one = crc32c_of(self._ends[::2], crc32c(b"".join(value.to_bytes(_WORD_BYTES, "little") for value in sums)))
        other = crc32c_of(self._ends[1::2])
        return one << 30 ^ other


def _held(value: Any) -> Any:
    """What this rank holds of a tensor."""
    return local_part(value).reshape(-1) if is_dtensor(value) else value


def _form(piece: Piece) -> tuple[Any, ...]:
    return (piece.name, piece.dtype, piece.shape, piece.start, piece.data.nbytes, piece.steady)


def _named(captured: Sequence[Captured]) -> Iterator[Piece]:
    """Pieces that objects laid out themselves, by their names in the checkpoint."""
    return (_with(piece, f"{each.name}/{piece.name}", piece.data) for each in captured for piece in each.pieces)


def _with(piece: Piece, name: str, data: memoryview | OnDevice) -> Piece:
    """A copy. (dataclasses.replace takes four times as long, while training waits.)"""
    return Piece(name=name, dtype=piece.dtype, shape=piece.shape, start=piece.start, data=data, steady=piece.steady)
