"""torch's DTensors as runs of flat tensors: what FSDP2 shards, in the words of a checkpoint.

A DTensor split along its first dimension is, on each rank, a run of rows: a run of elements of the flattened tensor.
Where it is replicated as well (HSDP), the replicas divide the writing among them, and each reads its own run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cfe_hpc.checkpoints.layout import divide
from cfe_hpc.errors import CheckpointError

__all__ = ["Run", "dtensor_identity", "dtensor_like", "is_dtensor", "local_part", "my_runs", "start_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Elements that this rank writes of one DTensor.

    Attributes:
        name: the tensor's.
        start: first element, counted in the flattened global tensor.
        local: this rank's shard, flattened.
        offset: first element in `local`.
        count: elements.
    """

    name: str
    start: int
    local: Any
    offset: int
    count: int


def is_dtensor(value: Any) -> bool:
    """Whether it is a torch DTensor, told without importing their package."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(value, package.DTensor)


def local_part(value: Any) -> Any:
    """The memory that this rank holds of a DTensor."""
    import torch

    with torch.no_grad():  # without a graph to_local is the very shard: a tenth of the time of detach().to_local()
        return value.to_local().detach()


def dtensor_identity(value: Any) -> tuple[Any, ...]:
    """Equal for DTensors that are one and the same memory, also on ranks whose shard is empty."""
    local = local_part(value)
    memory = local.untyped_storage().data_ptr() or id(value)
    return (
        "dtensor",
        memory,
        local.storage_offset(),
        local.shape,
        local.stride(),
        value.dtype,
        value.shape,
        value.placements,
        value.device_mesh,
        value.requires_grad,
    )


def start_of(value: Any, name: str) -> int:
    """Where this rank's run begins in the flattened global tensor.

    Raises:
        CheckpointError: it is placed otherwise than by Shard(0) and Replicate.
    """
    rows, start = _rows(value, name)
    local = local_part(value)
    if tuple(local.shape) != (*rows, *value.shape[1:]):
        raise CheckpointError(
            f"{name}: this rank's shard is {list(local.shape)}, and {[*rows, *value.shape[1:]]} was expected of "
            f"{value.placements}"
        )
    return start * math.prod(int(size) for size in value.shape[1:])


def _rows(value: Any, name: str) -> tuple[tuple[int, ...], int]:
    """(rows that this rank holds, or nothing of a tensor without dimensions; the first of them)."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, place = value.device_mesh, value.device_mesh.get_coordinate()
    start, count = 0, value.shape[0] if value.shape else 1
    for axis, placement in enumerate(value.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard or placement.dim != 0:
            raise CheckpointError(
                f"{name}: a DTensor placed {value.placements} cannot be stored; only Shard(0) and Replicate can"
            )
        each = -(-count // mesh.size(axis))
        low = min(each * place[axis], count) if place is not None else count
        start, count = start + low, min(each, count - low)
    return ((count,) if value.shape else ()), start


def my_runs(dtensors: Mapping[str, Any]) -> Iterator[Run]:
    """What this rank writes: over all ranks of their mesh each element once. Empty runs of other tensors than empty
    ones are left out.

    Raises:
        CheckpointError: one is placed otherwise than by Shard(0) and Replicate.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    for name, value in dtensors.items():
        alike.setdefault(_replica(value), []).append(name)
    for (part, parts), names in alike.items():
        locals_ = [local_part(dtensors[name]).reshape(-1) for name in names]
        facts = [(str(local.dtype).removeprefix("torch."), tuple(local.shape)) for local in locals_]
        for index, offset, count in divide(facts, part, parts):
            value, name = dtensors[names[index]], names[index]
            if count or not value.numel():
                yield Run(
                    name=name,
                    start=start_of(value, name) + offset,
                    local=locals_[index],
                    offset=offset,
                    count=count,
                )


def _replica(value: Any) -> tuple[int, int]:
    """(this rank's place among those that hold the same shard, how many do)."""
    from torch.distributed.tensor import Replicate

    mesh, place = value.device_mesh, value.device_mesh.get_coordinate()
    part, parts = 0, 1
    for axis, placement in enumerate(value.placements):
        if type(placement) is Replicate and place is not None:
            part, parts = part * mesh.size(axis) + place[axis], parts * mesh.size(axis)
    return part, parts


def dtensor_like(value: Any, dtype: Any) -> Any:
    """A DTensor laid out as `value`, of another dtype maybe, whose elements are yet to be filled."""
    import torch
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        torch.empty_like(local_part(value), dtype=dtype),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
