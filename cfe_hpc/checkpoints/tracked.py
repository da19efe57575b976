"""What a run tracks, as pieces and trees of this rank, and back into the objects.

Every object's state is a tree with tensors. A tensor that all ranks hold alike, bit for bit (a replicated model, its
optimizer), is divided among them, so that each rank writes about the same number of bytes; one that differs (a
buffer that each rank updates for itself, a data sampler's) is saved by each rank. Nothing is assumed: ranks compare
checksums. Objects with the Sharded protocol lay out their own pieces.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cfe_hpc.checkpoints import codec
from cfe_hpc.checkpoints.agree import all_ranks
from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.layout import DTYPE_BYTES, divide
from cfe_hpc.checkpoints.protocols import Group, Piece, ReadInto, Sharded
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.restoring import check_module, check_optimizer, differences, load_module, load_optimizer
from cfe_hpc.checkpoints.rng import capture_rng, restore_rng
from cfe_hpc.checkpoints.store import Content
from cfe_hpc.checkpoints.tensors import describe, tensor_bytes
from cfe_hpc.errors import CheckpointError, CheckpointMismatch

__all__ = ["capture", "is_trackable", "restore"]

_log = logging.getLogger(__name__)
_RNG = "~rng"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """One object: its entry in the state tree, its tensors by name, and the pieces that it laid out itself."""

    name: str
    entry: dict[str, Any]
    tensors: dict[str, Any]
    pieces: tuple[Piece, ...] = ()
    layout: Any = None


def is_trackable(thing: Any) -> bool:
    """Whether `capture` can take it: the Sharded protocol, or state_dict and load_state_dict."""
    return _is_sharded(thing) or all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_sharded(thing: Any) -> bool:
    methods = ("checkpoint_layout", "checkpoint_state", "load_checkpoint_state")
    return all(callable(getattr(thing, name, None)) for name in methods)


def _bare(thing: Any) -> Any:
    """What is saved in an object's place: the module inside DDP or torch.compile, a DeepSpeed engine's adapter."""
    if "deepspeed" in sys.modules and not _is_sharded(thing):
        from cfe_hpc.checkpoints.deepspeed import DeepSpeedState, is_deepspeed_engine

        if is_deepspeed_engine(thing):
            return DeepSpeedState(thing)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(thing, torch.nn.Module):
        return thing
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while isinstance(thing, parallel) or hasattr(thing, "_orig_mod"):
        thing = thing.module if isinstance(thing, parallel) else thing._orig_mod
    return thing


def _kind(thing: Any) -> str:
    torch = sys.modules.get("torch")
    if _is_sharded(thing):
        return "sharded"
    if torch is not None and isinstance(thing, torch.nn.Module):
        return "module"
    return "optimizer" if torch is not None and isinstance(thing, torch.optim.Optimizer) else "object"


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

    def encode() -> bytes:
        captured.extend(_capture(name, _bare(thing)) for name, thing in objects.items())
        captured.append(_captured_rng())
        return json.dumps({each.name: _shape_sum(each) for each in captured}).encode()

    shapes = [json.loads(found) for found in all_ranks(group, encode)]
    if any(list(found) != list(shapes[0]) for found in shapes):
        raise CheckpointError(
            "ranks track different objects: " + "; ".join(sorted({", ".join(found) for found in shapes}))
        )
    alike = {name for name in shapes[0] if all(found[name] == shapes[0][name] for found in shapes)}
    shared, own = _split(captured, alike, group)
    return Content(
        pieces=[*(piece for each in captured for piece in each.pieces), *_my_share(shared, group)],
        own=[_whole(name, tensor) for name, tensor in own.items()],
        state={each.name: each.entry for each in captured},
        layout={
            "facts": dict(facts or {}),
            "objects": {each.name: each.layout for each in captured if each.layout is not None},
        },
    )


def _capture(name: str, thing: Any) -> _Captured:
    kind = _kind(thing)
    if kind == "sharded":
        return _capture_sharded(name, thing)
    state = thing.state_dict()
    tree, tensors = codec.encode(state, name)
    entry = {"kind": kind, "tree": tree}
    metadata = getattr(state, "_metadata", None)
    if kind == "module" and metadata is not None:
        entry["metadata"], _ = codec.encode(dict(metadata), f"{name}/metadata")
    return _Captured(name=name, entry=entry, tensors=tensors)


def _capture_sharded(name: str, thing: Sharded) -> _Captured:
    layout = thing.checkpoint_layout()
    pieces, state = thing.checkpoint_state()
    tree, tensors = codec.encode(state, f"{name}/~")
    named = tuple(
        Piece(name=f"{name}/{piece.name}", dtype=piece.dtype, shape=piece.shape, start=piece.start, data=piece.data)
        for piece in pieces
    )
    return _Captured(name=name, entry={"kind": "sharded", "tree": tree}, tensors=tensors, pieces=named, layout=layout)


def _captured_rng() -> _Captured:
    tree, tensors = codec.encode(capture_rng(), _RNG)
    return _Captured(name=_RNG, entry={"kind": "rng", "tree": tree}, tensors=tensors)


def _shape_sum(captured: _Captured) -> int:
    refs = {ref.name: [ref.dtype, ref.shape] for ref in codec.refs(captured.entry["tree"])}
    return crc32c(json.dumps([refs[name] + [name] for name in captured.tensors]).encode())


def _split(captured: Sequence[_Captured], alike: set[str], group: Group) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors that all ranks hold alike, and this rank's others. Collective."""
    candidates = {name: tensor for each in captured if each.name in alike for name, tensor in each.tensors.items()}
    others = {name: tensor for each in captured if each.name not in alike for name, tensor in each.tensors.items()}
    if group.size == 1 or not candidates:
        return candidates, others
    sums: list[int] = []

    def checksums() -> bytes:
        sums.extend(crc32c(tensor_bytes(tensor)) for tensor in candidates.values())
        return b""

    all_ranks(group, checksums)
    extremes = group.all_max([*sums, *(-value for value in sums)])
    shared: dict[str, Any] = {}
    own = dict(others)
    for index, (name, tensor) in enumerate(candidates.items()):
        same = extremes[index] == -extremes[index + len(sums)]
        (shared if same else own)[name] = tensor
    if own and group.rank == 0:
        _log.debug("%d of %d tensors are saved by each rank for itself", len(own), len(own) + len(shared))
    return shared, own


def _my_share(shared: Mapping[str, Any], group: Group) -> Iterator[Piece]:
    names = list(shared)
    wholes = [_facts(tensor) for tensor in shared.values()]
    for index, start, count in divide(wholes, group.rank, group.size):
        dtype, shape = wholes[index]
        low, item_bytes = start * DTYPE_BYTES[dtype], DTYPE_BYTES[dtype]
        content = tensor_bytes(shared[names[index]])[low : low + count * item_bytes]
        yield Piece(name=names[index], dtype=dtype, shape=shape, start=start, data=content)


def _whole(name: str, tensor: Any) -> Piece:
    dtype, shape = _facts(tensor)
    return Piece(name=name, dtype=dtype, shape=shape, start=0, data=tensor_bytes(tensor))


def _facts(tensor: Any) -> tuple[str, tuple[int, ...]]:
    described = describe(tensor, "")
    return described["dtype"], tuple(described["shape"])


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
    bare = {name: _bare(thing) for name, thing in objects.items()}
    state = opened.state(group.rank)

    def check() -> bytes:
        found = list(_mismatches(opened, state, bare, facts))
        if found:
            raise CheckpointMismatch(f"{opened.folder.name} does not fit the job: " + "; ".join(found))
        return b""

    def load() -> bytes:
        own = opened.own(group.rank)
        for name, thing in bare.items():
            _load(thing, name, state[name], _fetch(own, opened.reader), opened.reader, device)
        if opened.world_size == group.size:
            restore_rng(codec.decode(state[_RNG]["tree"], _fetch(own, opened.reader)))
        elif group.rank == 0:
            _log.warning(
                "%s was saved by %d ranks and %d resume: random generators start from the job's seed",
                opened.folder.name,
                opened.world_size,
                group.size,
            )
        return b""

    all_ranks(group, check)
    all_ranks(group, load)


def _mismatches(
    opened: Opened, state: Any, objects: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> Iterator[str]:
    saved = [name for name in state if name != _RNG]
    yield from (f"{name} is tracked, and not in the checkpoint" for name in objects if name not in state)
    yield from (f"{name} is in the checkpoint, and not tracked" for name in saved if name not in objects)
    layout = opened.manifest.layout
    yield from differences(layout["facts"], json.loads(json.dumps(dict(facts or {}))), "")
    for name, thing in objects.items():
        if name not in state:
            continue
        kind, was = _kind(thing), state[name]["kind"]
        if kind != was:
            yield f"{name} was saved from a {was} and is a {kind}"
        elif kind == "sharded":
            yield from differences(layout["objects"][name], json.loads(json.dumps(thing.checkpoint_layout())), name)
        elif kind == "module":
            yield from check_module(thing, state[name]["tree"], name)
        elif kind == "optimizer":
            yield from check_optimizer(thing, state[name]["tree"], name)


def _fetch(own: ReadInto, shared: ReadInto) -> codec.Fetch:
    mine = set(own.names())

    def fetch(ref: codec.TensorRef, out: memoryview) -> None:
        (own if ref.name in mine else shared).read_into(ref.name, 0, out)

    return fetch


def _load(thing: Any, name: str, entry: dict[str, Any], fetch: codec.Fetch, reader: ReadInto, device: str) -> None:
    tree = codec.decode(entry["tree"], fetch, device)
    if entry["kind"] == "sharded":
        cast(Sharded, thing).load_checkpoint_state(_Within(reader, f"{name}/"), tree)
    elif entry["kind"] == "module":
        load_module(thing, tree, codec.decode(entry["metadata"], fetch) if "metadata" in entry else None)
    elif entry["kind"] == "optimizer":
        load_optimizer(thing, tree)
    else:
        thing.load_state_dict(tree)


class _Within:
    """The tensors whose names begin with a prefix, by the rest of their names; a ReadInto."""

    def __init__(self, reader: ReadInto, prefix: str) -> None:
        self._reader, self._prefix = reader, prefix

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
        self._reader.read_into(self._prefix + name, start, out)

    def enqueue(self, name: str, start: int, out: memoryview) -> None:
        self._reader.enqueue(self._prefix + name, start, out)

    def flush(self, *, alike: bool = False) -> None:
        self._reader.flush(alike=alike)
