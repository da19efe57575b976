"""A checkpoint's state back into what a run tracks; see capturing for the way there."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from cfe_hpc.checkpoints import codec
from cfe_hpc.checkpoints.agree import all_ranks
from cfe_hpc.checkpoints.protocols import Group, ReadInto, Sharded
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.state import restoring
from cfe_hpc.checkpoints.state.capturing import RNG, Capturing, capture, parameter_names
from cfe_hpc.checkpoints.state.filling import Filling
from cfe_hpc.checkpoints.state.kinds import bare, is_trackable, kind_of
from cfe_hpc.checkpoints.state.rng import restore_rng
from cfe_hpc.errors import CheckpointMismatch, CorruptCheckpoint

__all__ = ["Capturing", "capture", "is_trackable", "restore"]

_log = logging.getLogger(__name__)


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
    try:
        phases.offers = all_ranks(group, phases.check)
        for phase in (phases.read, phases.finish, phases.finish_sharded):
            all_ranks(group, phase)
    finally:
        opened.part()
    if opened.world_size == group.size:
        restore_rng(phases.trees[RNG])
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
        self._opened, self._facts, self._rank = opened, facts, group.rank
        self._state = opened.state(group.rank)
        self._objects = {name: bare(thing) for name, thing in objects.items()}
        self._filling = Filling(opened.own(group.rank), opened.reader, device=device, alike=group.size > 1)
        self._finishes: list[restoring.Finish] = []
        self.trees: dict[str, Any] = {}
        self.offers: list[bytes] = []

    def check(self) -> bytes:
        """Compare; nothing is read or changed. What this rank offers to those near it."""
        found = list(_mismatches(self._opened, self._state, self._objects, self._facts))
        if found:
            raise CheckpointMismatch(f"{self._opened.folder.name} does not fit the job: " + "; ".join(found))
        return self._opened.offer()

    def read(self) -> bytes:
        """Read all but what sharded objects read for themselves."""
        self._opened.meet(self.offers, self._rank)
        for name, thing in self._objects.items():
            entry = self._state[name]
            if entry["kind"] == "sharded":
                self.trees[name] = codec.decode(entry["tree"], self._filling.new)
            else:
                self._finishes.append(_LOADERS[entry["kind"]](thing, entry, self._filling))
        self.trees[RNG] = codec.decode(self._state[RNG]["tree"], self._filling.new)
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
    saved = [name for name in state if name != RNG]
    yield from (f"{name} is tracked, and not in the checkpoint" for name in objects if name not in state)
    yield from (f"{name} is in the checkpoint, and not tracked" for name in saved if name not in objects)
    layout = opened.manifest.layout
    yield from restoring.differences(layout["facts"], json.loads(json.dumps(dict(facts or {}))), "")
    names = parameter_names(objects)
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
