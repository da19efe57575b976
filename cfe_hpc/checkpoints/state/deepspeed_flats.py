"""Where each of DeepSpeed's optimizers keeps the flat tensors that it trains, and which parameters lie in them.

DeepSpeedZeroOptimizer         ZeRO 1 and 2: a group's parameters end to end; rank r owns the r-th of `world` equal
                               parts, padded
BF16_Optimizer                 ZeRO 1 in bf16 with gradients accumulated in fp32: the same
DeepSpeedZeroOptimizer_Stage3  ZeRO 3: every parameter in `world` equal parts, padded; a rank's flat tensor is its
                               part of each, in order
FP16_UnfusedOptimizer          no ZeRO, bf16: every rank has a master of every parameter
torch.optim.*                  no ZeRO, fp32: every rank has every parameter

Read in DeepSpeed 0.19.8; the names are the same since 0.16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["KNOWN", "Flat", "Run", "flats_of", "shape_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Elements [start, start + count) of a parameter, lying at `offset` of a flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """One flat master tensor of this rank.

    Attributes:
        key: the tensor that the optimizer's state is kept under; it has none for a frozen parameter.
        master: `key`, one-dimensional.
        group: index of its parameter group; -1 for a frozen parameter.
        names: every parameter of the flat tensor, over all ranks, in order: the same on every rank.
        runs: what this rank holds; `written` is the part of it that this rank saves.
    """

    key: Tensor
    master: Tensor
    group: int
    names: tuple[str, ...]
    runs: tuple[Run, ...]
    written: tuple[Run, ...]


def flats_of(engine: Any, *, rank: int, world: int) -> Iterator[Flat]:
    """The flat masters of one rank of a DeepSpeedEngine, in the optimizer's order, then its frozen parameters.

    A parameter that several modules share goes by its first name.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    find = KNOWN.get(type(engine.optimizer).__name__, _plain_flats)
    trained: set[str] = set()
    for flat in find(engine.optimizer, names, rank, world):
        trained.update(flat.names)
        yield flat
    for name, parameter in engine.module.named_parameters():
        if name not in trained:
            yield _frozen(name, parameter, rank, world)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Shape of a whole parameter; ZeRO 3 leaves the parameter itself empty between uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _zero12_flats(optimizer: Any, names: dict[int, str], rank: int, world: int) -> Iterator[Flat]:
    masters = optimizer.single_partition_of_fp32_groups
    for index, (parameters, master) in enumerate(zip(optimizer.bit16_groups, masters, strict=True)):
        yield _joined(index, parameters, master, names, rank)


def _bf16_flats(optimizer: Any, names: dict[int, str], rank: int, world: int) -> Iterator[Flat]:
    masters = optimizer.fp32_groups_flat_partition
    for index, (parameters, master) in enumerate(zip(optimizer.bf16_groups, masters, strict=True)):
        yield _joined(index, parameters, master, names, rank)


def _joined(index: int, parameters: Sequence[Tensor], master: Tensor, names: dict[int, str], rank: int) -> Flat:
    """Parameters end to end, of which `master` is the rank-th stretch."""
    low, high = rank * master.numel(), (rank + 1) * master.numel()
    runs, begin = [], 0
    for parameter in parameters:
        end = begin + parameter.numel()
        first, last = max(low, begin), min(high, end)
        if first < last:
            name, shape = names[id(parameter)], tuple(parameter.shape)
            runs.append(Run(name=name, shape=shape, start=first - begin, offset=first - low, count=last - first))
        begin = end
    order = tuple(names[id(parameter)] for parameter in parameters)
    return Flat(key=master, master=master, group=index, names=order, runs=tuple(runs), written=tuple(runs))


def _zero3_flats(optimizer: Any, names: dict[int, str], rank: int, world: int) -> Iterator[Flat]:
    masters = optimizer.fp32_partitioned_groups_flat
    for index, (parameters, master) in enumerate(zip(optimizer.fp16_groups, masters, strict=True)):
        runs, offset = [], 0
        for parameter in parameters:
            runs += _part(names[id(parameter)], parameter, rank, offset)
            offset += parameter.partition_numel()
        order = tuple(names[id(parameter)] for parameter in parameters)
        group = optimizer.sub_group_to_group_id[index]
        yield Flat(key=master, master=master, group=group, names=order, runs=tuple(runs), written=tuple(runs))


def _part(name: str, parameter: Any, rank: int, offset: int) -> list[Run]:
    """The rank-th of the equal parts that ZeRO 3 makes of a parameter; none where that is padding only."""
    start = rank * parameter.partition_numel()
    count = min(parameter.partition_numel(), parameter.ds_numel - start)
    return [Run(name=name, shape=shape_of(parameter), start=start, offset=offset, count=count)] if count > 0 else []


def _frozen(name: str, parameter: Any, rank: int, world: int) -> Flat:
    """A parameter that no optimizer trains: whole on every rank, but for ZeRO 3."""
    if not hasattr(parameter, "ds_tensor"):
        return _whole(-1, name, parameter, rank, world)
    held = parameter.ds_tensor
    runs = tuple(_part(name, parameter, rank, 0))
    return Flat(key=held, master=held.detach().view(-1), group=-1, names=(name,), runs=runs, written=runs)


def _unfused_flats(optimizer: Any, names: dict[int, str], rank: int, world: int) -> Iterator[Flat]:
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    for index, (weights, masters) in enumerate(groups):
        for weight, master in zip(weights, masters, strict=True):
            yield _whole(index, names[id(weight)], master, rank, world)


def _plain_flats(optimizer: Any, names: dict[int, str], rank: int, world: int) -> Iterator[Flat]:
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            yield _whole(index, names[id(parameter)], parameter, rank, world)


def _whole(index: int, name: str, master: Tensor, rank: int, world: int) -> Flat:
    """A parameter that every rank has; this one writes the rank-th share of it."""
    shape, numel = tuple(master.shape), master.numel()
    share = -(-numel // world)
    low, high = min(rank * share, numel), min((rank + 1) * share, numel)
    held = Run(name=name, shape=shape, start=0, offset=0, count=numel)
    written = (Run(name=name, shape=shape, start=low, offset=low, count=high - low),) if low < high else ()
    flat = master.detach().view(-1)
    return Flat(key=master, master=flat, group=index, names=(name,), runs=(held,), written=written)


KNOWN: dict[str, Callable[[Any, dict[int, str], int, int], Iterator[Flat]]] = {
    "DeepSpeedZeroOptimizer": _zero12_flats,
    "BF16_Optimizer": _bf16_flats,
    "DeepSpeedZeroOptimizer_Stage3": _zero3_flats,
    "FP16_UnfusedOptimizer": _unfused_flats,
}
"""DeepSpeed's optimizers to what finds their flat tensors; the others are torch's own, or refused."""
