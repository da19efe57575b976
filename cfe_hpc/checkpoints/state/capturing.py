"""What a run tracks, as pieces and trees of this rank.

Every object's state is a tree with tensors. A tensor that all ranks hold alike, bit for bit (a replicated model, its
optimizer), is divided among them, so that each rank writes about the same number of bytes; one that differs (a
buffer that each rank updates for itself, a data sampler's) is saved by each rank. What DistributedDataParallel keeps
alike is taken as alike, but for a look at both ends of each tensor (see contracts); of everything else ranks compare
checksums. DTensors are written by the ranks that hold them, and objects with the Sharded protocol lay out their own
pieces.

Which rank writes what is worked out by the first capture, and holds for later ones as long as nothing it depends on
changes (see plans): training waits for each of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cfe_hpc.checkpoints import codec
from cfe_hpc.checkpoints.agree import all_ranks
from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.layout import divide
from cfe_hpc.checkpoints.protocols import Group, Sharded
from cfe_hpc.checkpoints.state import restoring
from cfe_hpc.checkpoints.state.contracts import NOTHING, Contracts, contracts_of
from cfe_hpc.checkpoints.state.dtensors import is_dtensor, my_runs
from cfe_hpc.checkpoints.state.kinds import bare, kind_of
from cfe_hpc.checkpoints.state.plans import Captured, Part, Plan
from cfe_hpc.checkpoints.state.rng import capture_rng
from cfe_hpc.checkpoints.state.tensors import digests
from cfe_hpc.checkpoints.state.uncollected import uncollected
from cfe_hpc.checkpoints.store import Content
from cfe_hpc.errors import CheckpointError

__all__ = ["RNG", "Capturing", "capture", "parameter_names"]

_log = logging.getLogger(__name__)
RNG = "~rng"
"""The name of the random generators' state."""


def capture(objects: Mapping[str, Any], *, group: Group, facts: Mapping[str, Any] | None = None) -> Content:
    """One capture: see Capturing. Collective."""
    return Capturing(objects, group=group, facts=facts).take()


class Capturing:
    """Captures of the same objects, one after the other."""

    def __init__(self, objects: Mapping[str, Any], *, group: Group, facts: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            objects: what to save, by name; at each capture the same names in the same order on every rank.
            facts: JSON that must agree with the job's at a restore.
        """
        self._objects, self._group = objects, group
        self._facts: Mapping[str, Any] = {} if facts is None else facts
        self._plan: Plan | None = None

    def take(self, ready: Callable[[object], bool] = lambda form: False) -> Content:
        """This rank's part of a checkpoint of the objects and of every random generator, as they are now. Collective.

        The pieces alias live tensors where they are on the CPU: write or copy them before training goes on.

        Args:
            ready: told the form of the content that is to be returned, whether this rank is ready for it; the content
                is `awaited` when every rank is. To ask along with this costs training no round of its own.

        Raises:
            CheckpointError: an object's state cannot be stored, or ranks track different names; the same on every rank.
        """
        with uncollected():
            captured: list[Captured] = []
            contracts = NOTHING
            content, digest, problem = None, 0, None
            try:
                captured = self._read()
                contracts = contracts_of(self._objects, self._group.size)
                if self._plan is not None:
                    content = self._plan.content(captured, contracts, self._facts)
                    digest = 0 if content is None else self._plan.digest(captured)
            except Exception as error:  # any failure at all is told when all ranks have met
                content, problem = None, error
            # Whether on every rank the plan holds, and what is to be alike still is: training waits for one round only.
            unready = content is None or not ready(content.form)
            changed, any_unready, highest, lowest = self._group.all_max(
                [int(content is None), int(unready), digest, -digest]
            )
            if content is not None and not changed and highest == -lowest:
                return replace(content, awaited=not any_unready)
            self._plan = None
            plan = self._agree(captured, contracts, problem)
            content = plan.content(captured, contracts, self._facts)
            assert content is not None
            self._plan = plan
            return content

    def _read(self) -> list[Captured]:
        """The state of every object, in their order, and of the random generators."""
        known = {} if self._plan is None else self._plan.sightings
        things = {name: bare(thing) for name, thing in self._objects.items()}
        captured = [_capture(name, thing, known.get(name, {})) for name, thing in things.items()]
        names = parameter_names(things)  # after the states: by then FSDP2 has its shards in place
        for each in captured:
            if each.kind == "optimizer":
                each.entry.update(restoring.optimizer_facts(things[each.name], names))
        rng = codec.Encoded(capture_rng(), RNG, known.get(RNG))
        captured.append(Captured(name=RNG, entry={"kind": "rng", "tree": rng.tree}, encoded=rng))
        return captured

    def _agree(self, captured: Sequence[Captured], contracts: Contracts, problem: Exception | None) -> Plan:
        """Work out with the other ranks who writes what. Collective."""
        runs: list[Part] = []

        def shape_sums() -> bytes:
            if problem is not None:
                raise problem
            dtensors = {name: each for name, each in _tensors(captured).items() if is_dtensor(each)}
            runs.extend(Part(run.name, run.start, run.offset, run.count) for run in my_runs(dtensors))
            return json.dumps({each.name: _shape_sum(each) for each in captured}).encode()

        shapes = [json.loads(found) for found in all_ranks(self._group, shape_sums)]
        if any(list(found) != list(shapes[0]) for found in shapes):
            raise CheckpointError(
                "ranks track different objects: " + "; ".join(sorted({", ".join(found) for found in shapes}))
            )
        alike = {name for name in shapes[0] if all(found[name] == shapes[0][name] for found in shapes)}
        return _planned(captured, alike, contracts, runs, self._group)


def _planned(
    captured: Sequence[Captured], alike: set[str], contracts: Contracts, runs: Sequence[Part], group: Group
) -> Plan:
    """The plan, once ranks have found which of the tensors that are no DTensors they hold alike. Collective."""
    tensors = [(each, name, tensor) for each in captured for name, tensor in each.tensors.items()]
    plain = [(each, name, tensor) for each, name, tensor in tensors if not is_dtensor(tensor)]
    candidates = {name: tensor for each, name, tensor in plain if each.name in alike}
    trusted: set[str] = set()
    doubtful: dict[str, Any] = {}
    apart: set[str] = set()
    if group.size > 1 and candidates:
        trusted = {name for each, name, tensor in plain if contracts.is_replicated(each.name, each.kind, tensor)}
        trusted &= candidates.keys()
        doubtful = {name: tensor for name, tensor in candidates.items() if name not in trusted or tensor.dim()}
        apart = _apart(doubtful, trusted, group)
    shared = [name for name in candidates if name not in apart]
    own = [name for _, name, _ in plain if name in apart or name not in candidates]
    facts = {name: found for each in captured for name, found in each.facts.items()}
    share = divide([facts[name] for name in shared], group.rank, group.size)
    return Plan(
        captured,
        contracts,
        parts=[*(Part(shared[index], start, start, count) for index, start, count in share), *runs],
        own=own,
        trusted=trusted - apart,
        compared=[name for name in doubtful if name not in apart],
    )


def _apart(doubtful: Mapping[str, Any], trusted: set[str], group: Group) -> set[str]:
    """Tensors that ranks do not hold alike. Collective."""
    sums: list[int] = []

    def sum_up() -> bytes:
        sums.extend(digests([(tensor, name not in trusted) for name, tensor in doubtful.items()]))
        return b""

    all_ranks(group, sum_up)
    extremes = group.all_max([*sums, *(-value for value in sums)])
    apart = {name for index, name in enumerate(doubtful) if extremes[index] != -extremes[index + len(sums)]}
    broken = sorted(trusted & apart)
    if broken and group.rank == 0:
        what = "differ between ranks, although DistributedDataParallel should keep them alike: each saves its own"
        _log.warning("%s and %d other tensors %s", broken[0], len(broken) - 1, what)
    return apart


def parameter_names(things: Mapping[str, Any]) -> dict[int, str]:
    """The tracked name of every parameter of the modules among bare objects, by its id."""
    return restoring.parameter_names({name: thing for name, thing in things.items() if kind_of(thing) == "module"})


def _capture(name: str, thing: Any, known: Mapping[str, codec.Sighting]) -> Captured:
    kind = kind_of(thing)
    if kind == "sharded":
        return _capture_sharded(name, thing, known)
    state = thing.state_dict()
    encoded = codec.Encoded(state, name, known)
    entry = {"kind": kind, "tree": encoded.tree}
    metadata = getattr(state, "_metadata", None)
    if kind == "module" and metadata is not None:
        entry["metadata"] = codec.Encoded(dict(metadata), f"{name}/metadata").tree
    return Captured(name=name, entry=entry, encoded=encoded)


def _capture_sharded(name: str, thing: Sharded, known: Mapping[str, codec.Sighting]) -> Captured:
    layout = thing.checkpoint_layout()
    pieces, state = thing.checkpoint_state()
    encoded = codec.Encoded(state, f"{name}/~", known)
    entry = {"kind": "sharded", "tree": encoded.tree}
    return Captured(name=name, entry=entry, encoded=encoded, pieces=tuple(pieces), layout=layout)


def _tensors(captured: Iterable[Captured]) -> dict[str, Any]:
    return {name: tensor for each in captured for name, tensor in each.tensors.items()}


def _shape_sum(captured: Captured) -> int:
    return crc32c(json.dumps(list(captured.facts.items())).encode())
