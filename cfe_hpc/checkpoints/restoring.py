"""Comparing a checkpoint with the job's objects before anything is read, and loading torch's own kinds exactly."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from cfe_hpc.checkpoints import codec
from cfe_hpc.checkpoints.tensors import dtype_name

__all__ = ["check_module", "check_optimizer", "differences", "load_module", "load_optimizer"]

_ABSENT = object()


def differences(saved: Any, wanted: Any, path: str) -> Iterator[str]:
    """Where two JSON trees differ, each place as one phrase."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        for key in [*saved, *(key for key in wanted if key not in saved)]:
            place = f"{path}.{key}" if path else str(key)
            yield from differences(saved.get(key, _ABSENT), wanted.get(key, _ABSENT), place)
    elif saved != wanted or type(saved) is not type(wanted):
        yield f"{path} is {_shown(saved)} in the checkpoint and {_shown(wanted)} in the job"


def _shown(value: Any) -> str:
    return "not set" if value is _ABSENT else repr(value)


def _entries(tree: Any) -> dict[str, Any]:
    ((tag, body),) = tree.items()
    return dict(body) if tag != "dict" else body


def check_module(module: Any, tree: Any, name: str) -> Iterator[str]:
    """Every tensor whose presence, shape or dtype differs between an encoded state_dict and a torch module."""
    saved = _entries(tree)
    wanted = module.state_dict()
    yield from (f"{name}: {key} is not in the checkpoint" for key in wanted if key not in saved)
    yield from (f"{name}: {key} is in the checkpoint, and not in the job's" for key in saved if key not in wanted)
    for key, value in wanted.items():
        ref = next(codec.refs(saved[key]), None) if "tensor" in (saved.get(key) or ()) else None
        if ref is None or not hasattr(value, "shape"):
            continue
        was, now = (ref.dtype, list(ref.shape)), (dtype_name(value.dtype), list(value.shape))
        if was != now:
            yield f"{name}: {key} is {was[0]} {was[1]} in the checkpoint and {now[0]} {now[1]} in the job's"


def check_optimizer(optimizer: Any, tree: Any, name: str) -> Iterator[str]:
    """Whether an encoded optimizer state has the optimizer's parameter groups, of the same sizes."""
    groups = [_entries(group)["params"] for group in _entries(tree)["param_groups"]]
    saved = [len(params) for params in groups]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if saved != wanted:
        yield f"{name}: its parameter groups have {saved} parameters in the checkpoint and {wanted} in the job's"


def load_module(module: Any, tree: Any, metadata: Any) -> None:
    """Load a decoded state_dict, strictly.

    Args:
        metadata: the versions that torch keeps beside a state_dict; None when there were none.
    """
    state = OrderedDict(tree)
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    module.load_state_dict(state, strict=True)


def load_optimizer(optimizer: Any, tree: Any) -> None:
    """Load a decoded optimizer state, bit for bit.

    torch casts floating-point state to its parameter's dtype, which would round the fp32 moments of bf16
    parameters: such tensors are put back as they were saved.
    """
    import torch

    optimizer.load_state_dict(tree)
    order = [index for group in tree["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(order, parameters, strict=True):
        state = optimizer.state[parameter] if index in tree["state"] else {}
        for key, value in tree["state"].get(index, {}).items():
            if torch.is_tensor(value) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)
