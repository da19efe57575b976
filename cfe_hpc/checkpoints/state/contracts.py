"""What training itself promises of tensors, so that a save need not find it out.

Replicas: the parameters of a module in DistributedDataParallel are the same on all of its ranks. They start so and
take the same updates; torch's own advice is to save those of rank 0. So are the states of optimizers that have no
other parameters.

Steadiness: parameters in the groups of a tracked torch optimizer, and its state, change in its step alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cfe_hpc.checkpoints.state.dtensors import is_dtensor, local_part
from cfe_hpc.checkpoints.state.tensors import is_live, is_tensor

__all__ = ["NOTHING", "Contracts", "contracts_of", "unchanged_since"]


@dataclass(frozen=True, slots=True)
class Contracts:
    """What holds of the tensors of tracked objects.

    Attributes:
        replicated: memory of parameters that DistributedDataParallel keeps alike on all ranks.
        stepped: memory of parameters that tracked optimizers step.
        alike: names of tracked optimizers all of whose parameters are replicated.
    """

    replicated: frozenset[tuple[Any, ...]]
    stepped: frozenset[tuple[Any, ...]]
    alike: frozenset[str]

    def is_replicated(self, name: str, kind: str, tensor: Any) -> bool:
        """Whether every rank holds the same bytes of a tensor of the object tracked as `name`."""
        if kind == "optimizer":
            return name in self.alike and is_tensor(tensor)
        return kind == "module" and _memory(tensor) in self.replicated

    def is_steady(self, name: str, kind: str, tensor: Any) -> bool:
        """Whether a piece of this tensor aliases memory that changes in a tracked optimizer's step alone.

        Args:
            name: of the tensor in the checkpoint.
            kind: of the object that it belongs to.
        """
        if not is_tensor(tensor) or not is_live(local_part(tensor) if is_dtensor(tensor) else tensor):
            return False
        if kind == "module":
            return _memory(tensor) in self.stepped
        return kind == "optimizer" and "/state/" in name and tensor.dim() > 0


NOTHING = Contracts(frozenset(), frozenset(), frozenset())


def contracts_of(objects: Mapping[str, Any], group_size: int) -> Contracts:
    """What holds for tracked objects, as they were tracked: still in their wrappers."""
    torch = sys.modules.get("torch")
    if torch is None:
        return NOTHING
    optimizers = {name: thing for name, thing in objects.items() if isinstance(thing, torch.optim.Optimizer)}
    parameters = {
        name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, optimizer in optimizers.items()
    }
    replicated = [each for thing in objects.values() for each in _replicated(torch, thing, group_size)]
    known = {id(parameter) for parameter in replicated}
    return Contracts(
        replicated=_memories(replicated),
        stepped=_memories(parameter for each in parameters.values() for parameter in each),
        alike=frozenset(name for name, each in parameters.items() if each and known.issuperset(map(id, each))),
    )


def _replicated(torch: Any, thing: Any, group_size: int) -> Iterable[Any]:
    """Parameters that a wrapper keeps alike on all `group_size` ranks."""
    if not isinstance(thing, torch.nn.Module):
        return
    parallel = torch.nn.parallel.DistributedDataParallel
    thing = getattr(thing, "_orig_mod", thing)
    if not isinstance(thing, parallel) or thing.process_group.size() != group_size or thing._comm_hooks:
        return  # a communication hook may average gradients over some of the ranks, as local SGD does
    yield from (each for name, each in thing.module.named_parameters() if name not in thing.parameters_to_ignore)


def _memories(parameters: Iterable[Any]) -> frozenset[tuple[Any, ...]]:
    return frozenset(found for parameter in parameters if (found := _memory(parameter)) is not None)


def _memory(tensor: Any) -> tuple[Any, ...] | None:
    """Equal for tensors that share all of their memory; None without any, or with more than one's."""
    if not is_tensor(tensor):
        return None
    local = local_part(tensor) if is_dtensor(tensor) else tensor
    if local.layout is not sys.modules["torch"].strided or local.numel() == 0:
        return None
    return (local.device, local.data_ptr(), local.numel(), local.dtype)


def unchanged_since(steady: Iterable[Any]) -> Callable[[], bool]:
    """A function that tells whether these tensors are as they are now, by torch's count of writes to each.

    Writes through `.data`, or by another library into the memory, are not counted.
    """
    versions = [(tensor, tensor._version) for tensor in steady]
    return lambda: all(tensor._version == version for tensor, version in versions)
