"""State trees through JSON and back: every value, bit for bit, or an error that names it."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc.checkpoints.codec import decode, encode, refs
from cfe_hpc.checkpoints.state.tensors import allocate, tensor_bytes
from cfe_hpc.errors import CheckpointError


def through(tree: Any) -> Any:
    encoded, tensors = encode(tree, "tree")
    stored = {name: bytes(tensor_bytes(tensor)) for name, tensor in tensors.items()}

    def make(ref) -> Any:
        made = allocate(ref, "cpu")
        if len(stored[ref.name]):
            tensor_bytes(made)[:] = stored[ref.name]
        return made

    return decode(json.loads(json.dumps(encoded, allow_nan=False)), make)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (one == other and math.copysign(1, one) == math.copysign(1, other)) or (one != one and other != other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, dict):
        if isinstance(one, defaultdict) and one.default_factory is not other.default_factory:
            return False
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad) and bytes(
            tensor_bytes(one)
        ) == bytes(tensor_bytes(other))
    if isinstance(one, np.ndarray):
        return (one.dtype.str, one.shape, one.tobytes()) == (other.dtype.str, other.shape, other.tobytes())
    if isinstance(one, np.generic):
        return (one.dtype.str, one.tobytes()) == (other.dtype.str, other.tobytes())
    return bool(one == other)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=20),
    st.complex_numbers(),
)
keys = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(max_size=5))
keys = st.one_of(keys, st.tuples(keys, keys))
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=4).map(lambda d: defaultdict(list, d)),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
    ),
    max_leaves=20,
)


@given(trees)
@settings(max_examples=300, deadline=None)
def test_any_plain_tree_returns(tree: Any) -> None:
    assert same(through(tree), tree)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_return_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = math.prod(shape) * dtype.itemsize
    content = bytes(random.Random(0).randrange(2 if dtype is torch.bool else 256) for _ in range(size))
    flat = torch.frombuffer(bytearray(content), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    assert same(through(tensor), tensor)  # NaN payloads included


def test_layout_flags_and_kinds_of_tensors_return() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "strided": base[1:, ::2],
        "transposed": base.t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "conj": torch.tensor([1 + 2j]).conj(),
        "grad": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }
    back = through(tree)
    assert all(same(back[key], tree[key]) for key in tree), back
    assert type(back["parameter"]) is torch.nn.Parameter and not back["frozen"].requires_grad


def test_torch_and_numpy_values_that_are_no_tensors_return() -> None:
    tree = [
        torch.float32,
        torch.Size([2, 3]),
        torch.device("cuda", 1),
        np.float32(0.1),
        np.int64(7),
        np.bool_(True),
        np.str_("é"),
        np.datetime64("2026-01-01"),
        {np.int64(3): 1},
    ]
    assert same(through(tree), tree)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "|b1", "<U3", "<M8[s]", "|S2", "<c8", "<i8", "<f4"])
def test_arrays_return(dtype: str) -> None:
    array = np.zeros((3, 4), dtype=dtype)
    array.view(np.uint8)[...] = 1
    assert same(through(array), array)
    assert same(through(array.T[1:]), array.T[1:])
    assert same(through(np.zeros((0, 2), dtype=dtype)), np.zeros((0, 2), dtype=dtype))


def test_generators_of_random_numbers_return() -> None:
    bit_generator = np.random.PCG64(5).state
    assert same(through(random.Random(3).getstate()), random.Random(3).getstate())
    assert same(through(np.random.RandomState(3).get_state()), np.random.RandomState(3).get_state())
    assert same(through(bit_generator), bit_generator)  # 128-bit integers


def test_tied_tensors_are_stored_once_and_stay_tied() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    tree = {"embed": weight, "head": weight, "rows": weight.data[:2]}
    encoded, tensors = encode(tree, "model")
    assert list(tensors) == ["model/embed", "model/rows"]
    assert [ref.name for ref in refs(encoded)] == ["model/embed", "model/embed", "model/rows"]
    back = through(tree)
    assert back["embed"] is back["head"] and back["rows"].shape == (2, 2)


class Odd:
    pass


class Fraction(float):
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Odd(), "Odd cannot be stored"),
        (Fraction(1.0), "Fraction cannot be stored"),
        (lambda: 0, "builtins.function cannot be stored"),
        (defaultdict(lambda: 0), "defaultdict of <function"),
        (torch.eye(2).to_sparse(), "sparse_coo float32 Tensor cannot be stored"),
        (torch.empty(2, device="meta"), "meta float32 Tensor cannot be stored"),
        (np.array([Odd()]), "an array of object cannot be stored"),
        (LOOP, "a list that holds itself cannot be stored"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_named_with_its_path(value: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode({"a": [1, {("x", 2): value}]}, "sampler")
    assert "sampler/a/1/('x', 2)" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tag_of_a_later_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown kind decimal"):
        decode({"decimal": "1.5"}, lambda ref: None)


def test_two_tensors_by_one_path_are_refused():
    with pytest.raises(CheckpointError, match="tree/a/b: two tensors are there by the same path"):
        encode({"a/b": torch.ones(2), "a": {"b": torch.zeros(2)}}, "tree")
