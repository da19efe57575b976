"""torch tensors and numpy arrays as bytes, bit for bit. The one place that knows both; each is imported when met."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cfe_hpc.checkpoints.layout import DTYPE_BYTES
from cfe_hpc.errors import CheckpointError

if TYPE_CHECKING:
    from cfe_hpc.checkpoints.codec import TensorRef

__all__ = ["build", "describe", "dtype_name", "identity", "small", "tensor_bytes"]

_NUMPY_WORDS = {
    "|b1": "bool",
    "|u1": "uint8",
    "|i1": "int8",
    "<u2": "uint16",
    "<i2": "int16",
    "<u4": "uint32",
    "<i4": "int32",
    "<u8": "uint64",
    "<i8": "int64",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "<c8": "complex64",
    "<c16": "complex128",
}


def dtype_name(dtype: Any) -> str:
    """A torch dtype without its prefix: "float32"."""
    return str(dtype).removeprefix("torch.")


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def identity(value: Any) -> tuple[Any, ...]:
    """Equal for tensors that are one and the same memory, seen the same way."""
    if not _is_torch(value) or value.layout is not _strided() or value.is_meta or value.numel() == 0:
        return (id(value),)
    return (
        str(value.device),
        value.data_ptr(),
        value.dtype,
        tuple(value.shape),
        tuple(value.stride()),
        value.requires_grad,
        type(value),
        value.is_conj(),
        value.is_neg(),
    )


def _strided() -> Any:
    import torch

    return torch.strided


def describe(value: Any, path: str) -> dict[str, Any]:
    """What a tree says of a tensor or array, but for its name.

    Raises:
        CheckpointError: a kind of tensor whose bytes are not its whole value.
    """
    if not _is_torch(value):
        return _describe_array(value, path)
    import torch

    kinds: dict[type, str] = {torch.Tensor: "tensor", torch.nn.Parameter: "parameter", torch.nn.Buffer: "buffer"}
    kind, word = kinds.get(type(value)), dtype_name(value.dtype)
    if kind is None or value.layout is not torch.strided or value.is_meta or word not in DTYPE_BYTES:
        where = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
        raise CheckpointError(f"{path}: a {where} {word} {type(value).__qualname__} cannot be stored; make it dense")
    return {
        "dtype": word,
        "shape": list(value.shape),
        "device": value.device.type,
        "kind": kind,
        "grad": value.requires_grad,
    }


def _describe_array(value: Any, path: str) -> dict[str, Any]:
    dtype = value.dtype
    if dtype.hasobject or dtype.names is not None:
        raise CheckpointError(f"{path}: an array of {dtype} cannot be stored; keep plain numbers in arrays")
    word = _NUMPY_WORDS.get(dtype.str)
    return {
        "dtype": word or "uint8",
        "shape": list(value.shape) if word else [value.nbytes],
        "device": "cpu",
        "kind": "array",
        "grad": False,
        "numpy": [dtype.str, list(value.shape)],
    }


def tensor_bytes(value: Any) -> memoryview:
    """A tensor's or array's elements, row-major. Aliases its memory where that is contiguous and on the CPU."""
    if not _is_torch(value):
        import numpy

        return memoryview(numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8).data)
    import torch

    if value.numel() == 0:
        return memoryview(b"")
    plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return memoryview(plain.reshape(-1).view(torch.uint8).numpy().data)


def build(ref: TensorRef, fill: Callable[[memoryview], None], device: str) -> Any:
    """A new tensor or array of `ref`.

    Args:
        fill: called with its writable bytes, unless it has none.
        device: where it goes when it was not on the CPU.
    """
    if ref.numpy is not None:
        return _build_array(ref, fill)
    import torch

    tensor = torch.empty(ref.shape, dtype=getattr(torch, ref.dtype))
    if tensor.numel():
        fill(memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data))
    if ref.device != "cpu":
        tensor = tensor.to(device)
    if ref.kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=ref.grad)
    if ref.kind == "buffer":
        return torch.nn.Buffer(tensor)
    return tensor.requires_grad_(ref.grad)


def _build_array(ref: TensorRef, fill: Callable[[memoryview], None]) -> Any:
    import numpy

    assert ref.numpy is not None
    dtype, shape = ref.numpy
    array = numpy.empty(shape, dtype=dtype)
    if array.nbytes:
        fill(memoryview(array.reshape(-1).view(numpy.uint8).data))
    return array


def small(tag: str, body: Any) -> Any:
    """The values of torch and numpy that are no tensors: "size", "dtype", "device" and numpy's "scalar"."""
    if tag == "scalar":
        import numpy

        dtype, content = body
        return numpy.frombuffer(bytes.fromhex(content), dtype=dtype)[0]
    import torch

    if tag == "size":
        return torch.Size(body)
    return torch.device(body) if tag == "device" else getattr(torch, body)
