"""State trees as JSON plus named tensors, and back, exactly. No pickle: only the types listed here exist.

A JSON scalar or list stands for itself; everything else is an object with a single key, its tag:

    {"float": "nan"}                       not-a-number and infinities        {"int": "0x…"}      beyond 64 bits
    {"dict": {…}} {"map": [[k, v], …]}     string keys; any keys              {"tuple": […]} {"set": […]} …
    {"tensor": {"name", "dtype", "shape", "device", "grad", "kind"}}           its bytes are stored by name

torch and numpy are imported only by what holds their values.
"""

from __future__ import annotations

import base64
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cfe_hpc.checkpoints.state import tensors
from cfe_hpc.errors import CheckpointError

__all__ = ["Encoded", "Make", "Sighting", "TensorRef", "decode", "encode", "entries", "refs"]

_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, set, tuple)}
_SEQUENCES: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_MAPS: dict[str, type] = {"map": dict, "ordered": OrderedDict, "counter": Counter}
_PLAIN = {type(None), bool, str}
_CONTAINERS = {list, tuple, set, frozenset, dict, OrderedDict, Counter, defaultdict}
_INT64 = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """A tensor as a tree names it.

    Attributes:
        name: tensors of one name in one tree are one tensor (tied weights).
        dtype: as in Piece.
        device: "cpu", or the type of the accelerator it was on.
        kind: "tensor", "parameter", "buffer", or numpy's "array".
        grad: requires_grad.
        numpy: numpy's dtype string and shape; None for torch tensors. Where torch has no word for that dtype, the
            array is stored as its bytes: `dtype` is uint8.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    device: str = "cpu"
    kind: str = "tensor"
    grad: bool = False
    numpy: tuple[str, tuple[int, ...]] | None = None


Make = Callable[[TensorRef], Any]
"""The tensor or array that stands in a tree for a named one."""


Sighting = tuple[tuple[Any, ...], dict[str, Any]]
"""How a tensor was met in a tree: `tensors.identity` of it, and its JSON."""


class Encoded:
    """A state tree as JSON, and its tensors.

    Attributes:
        tree: the JSON.
        tensors: tensors and arrays by name, not copied. Views of one memory with the same shape are one tensor.
        sightings: every tensor in the tree by its path, in the tree's order; tied ones as often as they stand there.
    """

    def __init__(self, tree: Any, name: str, known: Mapping[str, Sighting] | None = None) -> None:
        """
        Args:
            name: the tree's own name; tensors are named by it and their path in the tree, "/" between.
            known: an earlier tree's sightings. The very JSON objects of those that are the same memory, seen the same
                way under the same name, are in this tree, too: they need not be made, nor compared.

        Raises:
            CheckpointError: a value of a type that cannot be stored; names its path and type.
        """
        self.tensors: dict[str, Any] = {}
        self.sightings: dict[str, Sighting] = {}
        self._known = known or {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._open: set[int] = set()
        self.tree = self._value(tree, name)

    def _value(self, value: Any, path: str) -> Any:
        """The JSON of any value."""
        kind: type = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            return value if -_INT64 <= value < _INT64 else {"int": hex(value)}
        if kind is float:
            return value if value - value == 0 else {"float": str(value)}
        if kind in _CONTAINERS:
            if id(value) in self._open:
                raise CheckpointError(f"{path}: a {kind.__name__} that holds itself cannot be stored")
            self._open.add(id(value))
            encoded = self._container(value, path)
            self._open.remove(id(value))
            return encoded
        if tensors.is_tensor(value):
            return self._tensor(value, path)
        if kind is complex:
            return {"complex": [self._value(value.real, path), self._value(value.imag, path)]}
        if kind is bytes or kind is bytearray:
            return {kind.__name__: base64.b64encode(value).decode()}
        return self._foreign(value, path)

    def _container(self, value: Any, path: str) -> Any:
        kind: type = type(value)
        if kind is list:
            return self._items(value, path)
        if kind in (tuple, set, frozenset):
            return {kind.__name__: self._items(value, path)}
        if kind is dict and set(map(type, value)) <= {str}:
            return {"dict": {key: self._value(item, f"{path}/{key}") for key, item in value.items()}}
        pairs = [
            [self._value(key, f"{path}/(key {key!r})"), self._value(item, f"{path}/{key}")]
            for key, item in value.items()
        ]
        if kind is defaultdict:
            return {"defaultdict": [self._factory(value.default_factory, path), pairs]}
        return {next(tag for tag, each in _MAPS.items() if each is kind): pairs}

    def _items(self, values: Any, path: str) -> list[Any]:
        kinds = set(map(type, values))
        # Thousands of numbers are usual (a generator's state, an order of samples), and training waits.
        if kinds <= _PLAIN or (kinds == {int} and min(values) >= -_INT64 and max(values) < _INT64):
            return list(values)
        return [self._value(item, f"{path}/{index}") for index, item in enumerate(values)]

    def _factory(self, factory: Any, path: str) -> str | None:
        if factory is None:
            return None
        name: str = getattr(factory, "__name__", "")
        if _FACTORIES.get(name) is not factory:
            raise CheckpointError(f"{path}: a defaultdict of {factory!r} cannot be stored")
        return name

    def _foreign(self, value: Any, path: str) -> Any:
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        if torch is not None:
            if type(value) is torch.Size:
                return {"size": list(value)}
            if type(value) is torch.dtype:
                return {"dtype": tensors.dtype_name(value)}
            if type(value) is torch.device:
                return {"device": str(value)}
        if numpy is not None:
            if type(value) is numpy.ndarray:
                return self._tensor(value, path)
            if isinstance(value, numpy.generic) and not value.dtype.hasobject and value.dtype.names is None:
                return {"scalar": [value.dtype.str, value.tobytes().hex()]}
        raise CheckpointError(
            f"{path}: a {type(value).__module__}.{type(value).__qualname__} cannot be stored; "
            "keep plain values, containers, tensors and arrays in a state_dict"
        )

    def _tensor(self, value: Any, path: str) -> dict[str, Any]:
        identity = tensors.identity(value)
        name = self._names.get(identity)
        if name is None:
            name = self._names[identity] = path.removeprefix("/")
            self.tensors[name] = value
        if path in self.sightings and self.sightings[path][0] != identity:
            raise CheckpointError(f"{path}: two tensors are there by the same path; give their keys other names")
        known = self._known.get(path)
        # An id is no memory: another array may have it by now.
        same = known is not None and len(identity) > 1 and known[0] == identity and known[1]["tensor"]["name"] == name
        sighting = known if known and same else (identity, {"tensor": {"name": name, **tensors.describe(value, path)}})
        self.sightings[path] = sighting
        return sighting[1]


def encode(tree: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """A state tree as JSON and its tensors by name: see Encoded."""
    encoded = Encoded(tree, name)
    return encoded.tree, encoded.tensors


def decode(encoded: Any, make: Make) -> Any:
    """The tree of `encode`'s JSON.

    Args:
        make: called once for each tensor name.

    Raises:
        CheckpointError: the JSON has a tag that this version does not know.
    """
    made: dict[str, Any] = {}

    def tensor(entry: dict[str, Any]) -> Any:
        ref = _ref(entry)
        if ref.name not in made:
            made[ref.name] = make(ref)
        return made[ref.name]

    return _decode(encoded, tensor)


def _decode(node: Any, tensor: Callable[[dict[str, Any]], Any]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensor) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, body),) = node.items()
    if tag == "tensor":
        return tensor(body)
    if tag == "dict":
        return {key: _decode(item, tensor) for key, item in body.items()}
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](_decode(item, tensor) for item in body)
    if tag in _MAPS:
        return _MAPS[tag]({_decode(key, tensor): _decode(item, tensor) for key, item in body})
    if tag == "defaultdict":
        factory, pairs = body
        items = {_decode(key, tensor): _decode(item, tensor) for key, item in pairs}
        return defaultdict(None if factory is None else _FACTORIES[factory], items)
    return _scalar(tag, body)


def _scalar(tag: str, body: Any) -> Any:
    if tag == "int":
        return int(body, 16)
    if tag == "float":
        return float(body)
    if tag == "complex":
        real, imag = (_decode(part, _no_tensor) for part in body)
        return complex(real, imag)
    if tag in ("bytes", "bytearray"):
        content = base64.b64decode(body)
        return content if tag == "bytes" else bytearray(content)
    if tag in ("size", "dtype", "device", "scalar"):
        return tensors.small(tag, body)
    raise CheckpointError(f"the checkpoint's state has a value of unknown kind {tag}")


def _no_tensor(entry: dict[str, Any]) -> Any:
    raise CheckpointError(f"tensor {entry['name']} stands where only a plain value can")


def _ref(entry: dict[str, Any]) -> TensorRef:
    numpy = entry.get("numpy")
    return TensorRef(
        name=entry["name"],
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        device=entry["device"],
        kind=entry["kind"],
        grad=entry["grad"],
        numpy=None if numpy is None else (numpy[0], tuple(numpy[1])),
    )


def entries(encoded: Any) -> list[tuple[Any, Any]]:
    """(key, encoded value) of an encoded dict of any kind, in its order. Keys are plain values.

    Raises:
        CheckpointError: it is no dict.
    """
    for tag, body in encoded.items() if isinstance(encoded, dict) else ():
        if tag == "dict":
            return list(body.items())
        if tag in _MAPS:
            return [(_decode(key, _no_tensor), item) for key, item in body]
    raise CheckpointError("the checkpoint's state has another value where a dict was expected")


def refs(encoded: Any) -> Iterator[TensorRef]:
    """Every tensor that the JSON names, in its order; tied ones as often as they stand there."""
    if isinstance(encoded, list):
        for item in encoded:
            yield from refs(item)
    elif isinstance(encoded, dict):
        ((tag, body),) = encoded.items()
        if tag == "tensor":
            yield _ref(body)
        elif tag == "dict":
            yield from refs(list(body.values()))
        elif tag in _SEQUENCES or tag in _MAPS or tag == "defaultdict":
            yield from refs(body)
