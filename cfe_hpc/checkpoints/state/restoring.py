"""Comparing a checkpoint with the job's objects before anything is read, and loading torch's own kinds exactly.

Loading has two halves: first the memory is found or made where each tensor belongs (a parameter's own, an optimizer
state's), and noted to be filled; when all of it is, the object takes its state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cfe_hpc.checkpoints import codec
from cfe_hpc.checkpoints.protocols import ReadInto
from cfe_hpc.checkpoints.state.dtensors import dtensor_like, is_dtensor
from cfe_hpc.checkpoints.state.filling import Filling
from cfe_hpc.checkpoints.state.tensors import dtype_name, is_tensor

__all__ = [
    "Finish",
    "check_module",
    "check_object",
    "check_optimizer",
    "check_sharded",
    "differences",
    "load_module",
    "load_object",
    "load_optimizer",
    "optimizer_facts",
    "parameter_names",
]

Finish = Callable[[], None]
"""Gives an object the state whose tensors are filled by now."""

_ABSENT = object()
_EXTRA_STATE = "_extra_state"  # torch's name for what a module keeps beside parameters and buffers


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


def _tensor_ref(node: Any) -> codec.TensorRef | None:
    """What an encoded tensor refers to; None for other values."""
    return next(codec.refs(node)) if isinstance(node, dict) and "tensor" in node else None


def check_module(module: Any, tree: Any, name: str) -> Iterator[str]:
    """Every tensor whose presence, shape or dtype differs between an encoded state_dict and a torch module."""
    saved = dict(codec.entries(tree))
    wanted = module.state_dict()
    yield from (f"{name}: {key} is not in the checkpoint" for key in wanted if key not in saved)
    yield from (f"{name}: {key} is in the checkpoint, and not in the job's" for key in saved if key not in wanted)
    for key, value in wanted.items():
        ref = _tensor_ref(saved.get(key))
        if ref is None or not is_tensor(value) or key.endswith(_EXTRA_STATE):
            continue
        was, now = (ref.dtype, list(ref.shape)), (dtype_name(value.dtype), list(value.shape))
        if was != now:
            yield f"{name}: {key} is {was[0]} {was[1]} in the checkpoint and {now[0]} {now[1]} in the job's"
        elif value.is_meta:
            yield f"{name}: {key} has no memory in the job's (meta); materialise the module first"


def parameter_names(modules: Mapping[str, Any]) -> dict[int, str]:
    """The tracked name of each parameter, by id: "model/blocks.0.weight"."""
    names: dict[int, str] = {}
    for module_name, module in modules.items():
        for key, value in _live_state(module).items():
            names.setdefault(id(value), f"{module_name}/{key}")
    return names


def optimizer_facts(optimizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """What an optimizer's state belongs to, as JSON, for `check_optimizer`: its class, and of each parameter group
    the parameters' [tracked name or null, dtype, shape]."""
    return {
        "class": type(optimizer).__name__,
        "parameters": [
            [[names.get(id(each)), dtype_name(each.dtype), list(each.shape)] for each in group["params"]]
            for group in optimizer.param_groups
        ],
    }


def check_optimizer(optimizer: Any, entry: Mapping[str, Any], name: str, names: Mapping[int, str]) -> Iterator[str]:
    """Where the class of an optimizer or the parameters of its groups differ from what was saved.

    Args:
        entry: the saved object's, with its encoded tree and, if it was saved with them, its `optimizer_facts`.
    """
    groups = [dict(codec.entries(group))["params"] for group in dict(codec.entries(entry["tree"]))["param_groups"]]
    was, wanted = [len(params) for params in groups], [len(group["params"]) for group in optimizer.param_groups]
    now = optimizer_facts(optimizer, names)
    if entry.get("class", now["class"]) != now["class"]:
        yield f"{name}: it was saved from {entry['class']} and is {now['class']}"
    if was != wanted:
        yield f"{name}: its parameter groups have {was} parameters in the checkpoint and {wanted} in the job's"
        return
    for group, (saved, here) in enumerate(zip(entry.get("parameters", ()), now["parameters"], strict=False)):
        for index, (one, other) in enumerate(zip(saved, here, strict=True)):
            named = one[0] is not None and other[0] is not None
            if one[1:] != other[1:] or (named and one[0] != other[0]):
                yield (
                    f"{name}: parameter {index} of group {group} is {_parameter(one)} in the checkpoint and "
                    f"{_parameter(other)} in the job's"
                )


def _parameter(facts: list[Any]) -> str:
    name, dtype, shape = facts
    return f"{name or 'of no tracked module,'} {dtype} {shape}"


def check_object(thing: Any, tree: Any, name: str) -> Iterator[str]:
    """What an object's own `check_state_dict`, if it has one, says of an encoded state."""
    if callable(getattr(thing, "check_state_dict", None)):
        yield from (f"{name}: {why}" for why in thing.check_state_dict(_outline(tree)))


def check_sharded(thing: Any, reader: ReadInto, tree: Any, name: str) -> Iterator[str]:
    """What a Sharded object's own `check_checkpoint_state`, if it has one, says of a checkpoint."""
    if callable(getattr(thing, "check_checkpoint_state", None)):
        yield from (f"{name}: {why}" for why in thing.check_checkpoint_state(reader, _outline(tree)))


def _outline(tree: Any) -> Any:
    """A decoded tree with references in the places of its tensors: no bytes are read."""
    return codec.decode(tree, lambda ref: ref)


def _live_state(module: Any) -> dict[str, Any]:
    """A module's state_dict with its very parameters and buffers."""
    import torch

    overridden = type(module).state_dict is not torch.nn.Module.state_dict
    with torch.no_grad():
        state: dict[str, Any] = module.state_dict() if overridden else module.state_dict(keep_vars=True)
    return state


def load_module(module: Any, entry: Mapping[str, Any], filling: Filling) -> Finish:
    """Have a module's parameters and buffers filled where they are; then it loads its own state_dict, strictly.

    torch copies nothing from a tensor onto itself, and whatever a module does of its own at loading is done.
    """
    here = _live_state(module)
    state: OrderedDict[str, Any] = OrderedDict()
    for key, node in codec.entries(entry["tree"]):
        ref, target = _tensor_ref(node), here[key]
        if ref is None or key.endswith(_EXTRA_STATE) or not is_tensor(target) or target.is_conj() or target.is_neg():
            state[key] = codec.decode(node, filling.new)
        else:
            filling.fill(ref.name, target)
            state[key] = target
    if "metadata" in entry:
        state._metadata = codec.decode(entry["metadata"], filling.new)  # type: ignore[attr-defined]
    return lambda: module.load_state_dict(state, strict=True)


def load_optimizer(optimizer: Any, entry: Mapping[str, Any], filling: Filling) -> Finish:
    """Have an optimizer's state filled, in the memory that it has for it or in new, and then loaded, bit for bit.

    torch casts floating-point state to its parameter's dtype, which would round the fp32 moments of bf16
    parameters: such tensors are put back as they were saved.
    """
    tree = {key: node for key, node in codec.entries(entry["tree"])}
    loaded = {key: codec.decode(node, filling.new) for key, node in tree.items() if key != "state"}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in loaded["param_groups"] for index in group["params"]]
    owners = dict(zip(order, parameters, strict=True))
    loaded["state"] = {
        index: _filled_state(optimizer, owners.get(index), node, filling)
        for index, node in codec.entries(tree["state"])
    }

    def finish() -> None:
        optimizer.load_state_dict(loaded)
        for index, parameter in owners.items():
            state = optimizer.state[parameter] if index in loaded["state"] else {}
            for key, value in loaded["state"].get(index, {}).items():
                if is_tensor(value) and state[key].dtype != value.dtype:
                    state[key] = value.to(state[key].device)

    return finish


def _filled_state(optimizer: Any, parameter: Any, node: Any, filling: Filling) -> Any:
    """One parameter's state, its tensors noted to be filled."""
    if parameter is None or not isinstance(node, dict) or "dict" not in node:
        return codec.decode(node, filling.new)
    here = optimizer.state.get(parameter, {})
    state = {}
    for key, value in codec.entries(node):
        ref = _tensor_ref(value)
        target = None if ref is None or ref.numpy is not None else _state_target(here.get(key), parameter, ref)
        if ref is None or target is None:
            state[key] = codec.decode(value, filling.new)
        else:
            filling.fill(ref.name, target)
            state[key] = target
    return state


def _state_target(here: Any, parameter: Any, ref: codec.TensorRef) -> Any:
    """The tensor of an optimizer's state that `ref` belongs into; None when it is no tensor like the parameter."""
    import torch

    dtype = getattr(torch, ref.dtype)
    if is_tensor(here) and (here.dtype, tuple(here.shape)) == (dtype, ref.shape):
        return here
    if not ref.shape or tuple(parameter.shape) != ref.shape:
        return None
    if is_dtensor(parameter):
        return dtensor_like(parameter, dtype)
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


def load_object(thing: Any, entry: Mapping[str, Any], filling: Filling) -> Finish:
    """Have the tensors of any object's state made and filled, and the state then loaded."""
    state = codec.decode(entry["tree"], filling.new)
    return lambda: thing.load_state_dict(state)
