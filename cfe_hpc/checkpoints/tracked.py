"""What a run tracks, as pieces and trees of this rank, and back into the objects.

Every object's state is a tree with tensors. A tensor that all ranks hold alike, bit for bit (a replicated model, its
optimizer), is divided among them, so that each rank writes about the same number of bytes; one that differs (a
buffer that each rank updates for itself, a data sampler's) is saved by each rank. What DistributedDataParallel keeps
alike is taken as alike, but for a look at both ends of each tensor (see contracts); of everything else ranks compare
checksums. DTensors are written by the ranks that hold them, and objects with the Sharded protocol lay out their own
pieces.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from cfe_hpc.checkpoints import codec, restoring
from cfe_hpc.checkpoints.agree import all_ranks
from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.contracts import Contracts, contracts_of, unchanged_since
from cfe_hpc.checkpoints.dtensors import Run, is_dtensor, my_runs
from cfe_hpc.checkpoints.filling import Filling
from cfe_hpc.checkpoints.kinds import bare, is_trackable, kind_of
from cfe_hpc.checkpoints.layout import divide
from cfe_hpc.checkpoints.protocols import Group, Piece, ReadInto, Sharded
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.rng import capture_rng, restore_rng
from cfe_hpc.checkpoints.store import Content
from cfe_hpc.checkpoints.tensors import digests, tensor_bytes
from cfe_hpc.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint

__all__ = ["capture", "is_trackable", "restore"]

_log = logging.getLogger(__name__)
_RNG = "~rng"
_Facts = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """One object: its entry in the state tree, its tensors by name, with (dtype, shape) of each, and the pieces that
    it laid out itself."""

    name: str
    entry: dict[str, Any]
    facts: dict[str, _Facts]
    tensors: dict[str, Any]
    dtensors: dict[str, Any] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()
    layout: Any = None

    @property
    def kind(self) -> str:
        kind: str = self.entry["kind"]
        return kind


def capture(objects: Mapping[str, Any], *, group: Group, facts: Mapping[str, Any] | None = None) -> Content:
    """This rank's part of a checkpoint of `objects` and of every random generator. Collective.

    The pieces alias live tensors where they are on the CPU: write or copy them before training goes on.

    Args:
        objects: what to save, by name; the same names in the same order on every rank.
        facts: JSON that must agree with the job's at a restore.

    Raises:
        CheckpointError: an object's state cannot be stored, or ranks track different names; the same on every rank.
    """
    captured: list[_Captured] = []
    runs: list[Run] = []

    def encode() -> bytes:
        things = {name: bare(thing) for name, thing in objects.items()}
        captured.extend(_capture(name, thing) for name, thing in things.items())
        names = _parameter_names(things)  # after the states: by then FSDP2 has its shards in place
        for each in captured:
            if each.kind == "optimizer":
                each.entry.update(restoring.optimizer_facts(things[each.name], names))
        captured.append(_captured_rng())
        runs.extend(my_runs({name: tensor for each in captured for name, tensor in each.dtensors.items()}))
        return json.dumps({each.name: _shape_sum(each) for each in captured}).encode()

    shapes = [json.loads(found) for found in all_ranks(group, encode)]
    if any(list(found) != list(shapes[0]) for found in shapes):
        raise CheckpointError(
            "ranks track different objects: " + "; ".join(sorted({", ".join(found) for found in shapes}))
        )
    alike = {name for name in shapes[0] if all(found[name] == shapes[0][name] for found in shapes)}
    contracts = contracts_of(objects, group.size)
    shared, own = _split(captured, alike, contracts, group)
    pieces = _Pieces(captured, contracts)
    return Content(
        pieces=[
            *(piece for each in captured for piece in each.pieces),
            *pieces.my_share(shared, group),
            *pieces.of_runs(runs),
        ],
        own=[pieces.of(name, tensor_bytes(tensor)) for name, tensor in own.items()],
        state={each.name: each.entry for each in captured},
        layout={
            "facts": dict(facts or {}),
            "objects": {each.name: each.layout for each in captured if each.layout is not None},
        },
        unchanged=unchanged_since(pieces.steady.values()),
    )


def _parameter_names(things: Mapping[str, Any]) -> dict[int, str]:
    return restoring.parameter_names({name: thing for name, thing in things.items() if kind_of(thing) == "module"})


def _capture(name: str, thing: Any) -> _Captured:
    kind = kind_of(thing)
    if kind == "sharded":
        return _capture_sharded(name, thing)
    state = thing.state_dict()
    tree, tensors = codec.encode(state, name)
    entry = {"kind": kind, "tree": tree}
    metadata = getattr(state, "_metadata", None)
    if kind == "module" and metadata is not None:
        entry["metadata"], _ = codec.encode(dict(metadata), f"{name}/metadata")
    dtensors = {name: tensor for name, tensor in tensors.items() if is_dtensor(tensor)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in dtensors}
    return _Captured(name=name, entry=entry, facts=_facts(tree), tensors=plain, dtensors=dtensors)


def _capture_sharded(name: str, thing: Sharded) -> _Captured:
    layout = thing.checkpoint_layout()
    pieces, state = thing.checkpoint_state()
    tree, tensors = codec.encode(state, f"{name}/~")
    named = tuple(_named(f"{name}/{piece.name}", piece) for piece in pieces)
    entry = {"kind": "sharded", "tree": tree}
    return _Captured(name=name, entry=entry, facts=_facts(tree), tensors=tensors, pieces=named, layout=layout)


def _named(name: str, piece: Piece) -> Piece:
    """`piece` by another name. (dataclasses.replace takes four times as long, while training waits.)"""
    return Piece(
        name=name, dtype=piece.dtype, shape=piece.shape, start=piece.start, data=piece.data, steady=piece.steady
    )


def _captured_rng() -> _Captured:
    tree, tensors = codec.encode(capture_rng(), _RNG)
    return _Captured(name=_RNG, entry={"kind": "rng", "tree": tree}, facts=_facts(tree), tensors=tensors)


def _facts(tree: Any) -> dict[str, _Facts]:
    return {ref.name: (ref.dtype, ref.shape) for ref in codec.refs(tree)}


def _shape_sum(captured: _Captured) -> int:
    return crc32c(json.dumps(list(captured.facts.items())).encode())


def _split(
    captured: Sequence[_Captured], alike: set[str], contracts: Contracts, group: Group
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors that all ranks hold alike, and this rank's others. Collective."""
    candidates = {name: tensor for each in captured if each.name in alike for name, tensor in each.tensors.items()}
    own = {name: tensor for each in captured if each.name not in alike for name, tensor in each.tensors.items()}
    if group.size == 1 or not candidates:
        return candidates, own
    kinds = {name: (each.name, each.kind) for each in captured for name in each.tensors}
    trusted = {name for name, tensor in candidates.items() if contracts.is_replicated(*kinds[name], tensor)}
    doubtful = {name: tensor for name, tensor in candidates.items() if name not in trusted or tensor.dim()}
    sums: list[int] = []

    def sum_up() -> bytes:
        sums.extend(digests([(tensor, name not in trusted) for name, tensor in doubtful.items()]))
        return b""

    all_ranks(group, sum_up)
    extremes = group.all_max([*sums, *(-value for value in sums)])
    apart = {name for index, name in enumerate(doubtful) if extremes[index] != -extremes[index + len(sums)]}
    own.update((name, tensor) for name, tensor in candidates.items() if name in apart)
    shared = {name: tensor for name, tensor in candidates.items() if name not in apart}
    if group.rank == 0:
        broken = sorted(trusted & apart)
        if broken:
            what = "differ between ranks, although DistributedDataParallel should keep them alike: each saves its own"
            _log.warning("%s and %d other tensors %s", broken[0], len(broken) - 1, what)
        _log.debug("%d of %d tensors are saved by each rank for itself", len(own), len(own) + len(shared))
    return shared, own


class _Pieces:
    """Makes pieces of named tensors.

    Attributes:
        steady: tensors whose pieces are.
    """

    def __init__(self, captured: Sequence[_Captured], contracts: Contracts) -> None:
        self._facts = {name: found for each in captured for name, found in each.facts.items()}
        self.steady = {
            name: tensor
            for each in captured
            for name, tensor in (*each.tensors.items(), *each.dtensors.items())
            if contracts.is_steady(name, each.kind, tensor)
        }

    def of(self, name: str, data: memoryview, start: int = 0) -> Piece:
        dtype, shape = self._facts[name]
        return Piece(name=name, dtype=dtype, shape=shape, start=start, data=data, steady=name in self.steady)

    def my_share(self, shared: Mapping[str, Any], group: Group) -> Iterator[Piece]:
        names = list(shared)
        for index, start, count in divide([self._facts[name] for name in names], group.rank, group.size):
            yield self.of(names[index], tensor_bytes(shared[names[index]], start, count), start)

    def of_runs(self, runs: Sequence[Run]) -> Iterator[Piece]:
        for run in runs:
            yield self.of(run.name, tensor_bytes(run.local, run.offset, run.count), run.start)


def restore(
    opened: Opened,
    objects: Mapping[str, Any],
    *,
    group: Group,
    facts: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> None:
    """Put a checkpoint's state back into `objects` and into every random generator. Collective.

    At another world size than the checkpoint's, ranks that were not there take rank 0's state, and the random
    generators stay as the job seeded them: each rank's stream belongs to its rank.

    Args:
        device: where an object's loose tensors go that were saved from an accelerator.

    Raises:
        CheckpointMismatch: facts, names, shapes or dtypes differ; all differences are named, and nothing was changed.
        CorruptCheckpoint: bytes are not those that were written; objects may have been changed.
        CheckpointError: an object refused its state; objects may have been changed.
    """
    phases = _Restore(opened, objects, group, facts or {}, device)
    for phase in (phases.check, phases.read, phases.finish, phases.finish_sharded):
        all_ranks(group, phase)
    if opened.world_size == group.size:
        restore_rng(phases.trees[_RNG])
    elif group.rank == 0:
        _log.warning(
            "%s was saved by %d ranks and %d resume: random generators start from the job's seed",
            opened.folder.name,
            opened.world_size,
            group.size,
        )


class _Restore:
    """The phases of `restore`, after each of which ranks agree."""

    def __init__(
        self, opened: Opened, objects: Mapping[str, Any], group: Group, facts: Mapping[str, Any], device: str
    ) -> None:
        self._opened, self._facts = opened, facts
        self._state = opened.state(group.rank)
        self._objects = {name: bare(thing) for name, thing in objects.items()}
        self._filling = Filling(opened.own(group.rank), opened.reader, device=device, alike=group.size > 1)
        self._finishes: list[restoring.Finish] = []
        self.trees: dict[str, Any] = {}

    def check(self) -> bytes:
        """Compare; nothing is read or changed."""
        found = list(_mismatches(self._opened, self._state, self._objects, self._facts))
        if found:
            raise CheckpointMismatch(f"{self._opened.folder.name} does not fit the job: " + "; ".join(found))
        return b""

    def read(self) -> bytes:
        """Read all but what sharded objects read for themselves."""
        for name, thing in self._objects.items():
            entry = self._state[name]
            if entry["kind"] == "sharded":
                self.trees[name] = codec.decode(entry["tree"], self._filling.new)
            else:
                self._finishes.append(_LOADERS[entry["kind"]](thing, entry, self._filling))
        self.trees[_RNG] = codec.decode(self._state[_RNG]["tree"], self._filling.new)
        self._filling.flush()
        return b""

    def finish(self) -> bytes:
        """Give objects their state."""
        for each in self._finishes:
            each()
        return b""

    def finish_sharded(self) -> bytes:
        """Let sharded objects read and take theirs, all of them before any failure to read is told."""
        readers = {name: _Within(self._opened.reader, f"{name}/") for name in self._objects if name in self.trees}
        for name, reader in readers.items():
            cast(Sharded, self._objects[name]).load_checkpoint_state(reader, self.trees[name])
        for reader in readers.values():
            reader.settle()
        return b""


_LOADERS: dict[str, Callable[[Any, Mapping[str, Any], Filling], restoring.Finish]] = {
    "module": restoring.load_module,
    "optimizer": restoring.load_optimizer,
    "object": restoring.load_object,
}


def _mismatches(
    opened: Opened, state: Any, objects: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> Iterator[str]:
    saved = [name for name in state if name != _RNG]
    yield from (f"{name} is tracked, and not in the checkpoint" for name in objects if name not in state)
    yield from (f"{name} is in the checkpoint, and not tracked" for name in saved if name not in objects)
    layout = opened.manifest.layout
    yield from restoring.differences(layout["facts"], json.loads(json.dumps(dict(facts or {}))), "")
    names = _parameter_names(objects)
    for name, thing in objects.items():
        if name not in state:
            continue
        kind, entry = kind_of(thing), state[name]
        if kind != entry["kind"]:
            yield f"{name} was saved from a {entry['kind']} and is a {kind}"
        elif kind == "sharded":
            yield from restoring.differences(
                layout["objects"][name], json.loads(json.dumps(thing.checkpoint_layout())), name
            )
            yield from restoring.check_sharded(thing, _Within(opened.reader, f"{name}/"), entry["tree"], name)
        elif kind == "module":
            yield from restoring.check_module(thing, entry["tree"], name)
        elif kind == "optimizer":
            yield from restoring.check_optimizer(thing, entry, name, names)
        else:
            yield from restoring.check_object(thing, entry["tree"], name)


class _Within:
    """The tensors whose names begin with a prefix, by the rest of their names; a ReadInto.

    Its object may enter collectives after it has read. So bytes that are not those that were written are not told
    to it, on one rank of several: it goes on with what there is, and `settle` tells when it is done.
    """

    def __init__(self, reader: ReadInto, prefix: str) -> None:
        self._reader, self._prefix = reader, prefix
        self._corrupt: CorruptCheckpoint | None = None

    def names(self) -> Sequence[str]:
        own = f"{self._prefix}~/"  # the tensors of the object's tree
        return [
            name.removeprefix(self._prefix)
            for name in self._reader.names()
            if name.startswith(self._prefix) and not name.startswith(own)
        ]

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self._reader.describe(self._prefix + name)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        with self._remembering():
            self._reader.read_into(self._prefix + name, start, out)

    def enqueue(self, name: str, start: int, out: memoryview) -> None:
        self._reader.enqueue(self._prefix + name, start, out)

    def flush(self, *, alike: bool = False) -> None:
        with self._remembering():
            self._reader.flush(alike=alike)

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except CorruptCheckpoint as error:
            self._corrupt = self._corrupt or error

    def settle(self) -> None:
        """Raise the first CorruptCheckpoint that was held back."""
        if self._corrupt is not None:
            raise self._corrupt
