"""torch tensors and numpy arrays as bytes, bit for bit. The one place that knows both; each is imported when met."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, DTYPE_BYTES
from cfe_hpc.checkpoints.state.dtensors import dtensor_identity, is_dtensor
from cfe_hpc.errors import CheckpointError

if TYPE_CHECKING:
    from cfe_hpc.checkpoints.codec import TensorRef
    from cfe_hpc.checkpoints.protocols import OnDevice

__all__ = [
    "DeviceBytes",
    "aliases",
    "allocate",
    "borrowed",
    "describe",
    "digests",
    "dtype_name",
    "identity",
    "is_live",
    "is_tensor",
    "small",
    "tensor_bytes",
    "tensor_data",
]

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
_DIGEST_MASK = (1 << 62) - 1
_MIX = (-7046029254386353131, -4658895280553007687)  # odd, as signed 64-bit numbers; splitmix64's
_SUMMED_BYTES = 1 << 22  # at once: their weights and products take 16 times as much


def dtype_name(dtype: Any) -> str:
    """A torch dtype without its prefix: "float32"."""
    return str(dtype).removeprefix("torch.")


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor, of any kind."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def identity(value: Any) -> tuple[Any, ...]:
    """Equal for tensors that are one and the same memory, seen the same way."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return (id(value),)
    if type(value) is not torch.Tensor and is_dtensor(value):
        return dtensor_identity(value)
    if value.layout is not torch.strided or value.is_meta or value.numel() == 0:
        return (id(value),)
    return (
        value.device,
        value.data_ptr(),
        value.dtype,
        value.shape,
        value.stride(),
        value.requires_grad,
        type(value),
        value.is_conj(),
        value.is_neg(),
    )


def _strided() -> Any:
    return sys.modules["torch"].strided


def describe(value: Any, path: str) -> dict[str, Any]:
    """What a tree says of a tensor or array, but for its name.

    Raises:
        CheckpointError: a kind of tensor whose bytes are not its whole value.
    """
    if not is_tensor(value):
        return _describe_array(value, path)
    torch = sys.modules["torch"]
    kinds: dict[type, str] = {torch.Tensor: "tensor", torch.nn.Parameter: "parameter", torch.nn.Buffer: "buffer"}
    kind = kinds.get(type(value), "tensor" if is_dtensor(value) else None)
    word = dtype_name(value.dtype)
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


def aliases(value: Any) -> bool:
    """Whether `tensor_bytes` of a torch tensor is its very memory: on the CPU, contiguous, nothing left to resolve."""
    return (
        not _on_device(value)
        and value.layout is _strided()
        and value.is_contiguous()
        and not value.is_conj()
        and not value.is_neg()
    )


def _on_device(value: Any) -> bool:
    return not value.is_cpu


def is_live(value: Any) -> bool:
    """Whether `tensor_data` of a torch tensor follows what is written to it, until it is copied."""
    return _on_device(value) or aliases(value)


def tensor_data(value: Any, start: int = 0, count: int | None = None) -> memoryview | OnDevice:
    """As `tensor_bytes`, but what lies on a device stays there until it is copied."""
    if is_tensor(value) and _on_device(value) and value.numel() and count != 0:
        return DeviceBytes(value, start, value.numel() - start if count is None else count)
    return tensor_bytes(value, start, count)


class DeviceBytes:
    """Elements of a tensor on a device, row-major, as a protocols.OnDevice."""

    __slots__ = ("_count", "_start", "_tensor", "device", "nbytes")

    def __init__(self, tensor: Any, start: int, count: int) -> None:
        self._tensor, self._start, self._count = tensor.detach(), start, count
        self.device, self.nbytes = tensor.device, count * tensor.element_size()

    def flat(self) -> Any:
        plain = self._tensor.resolve_conj().resolve_neg().reshape(-1)[self._start : self._start + self._count]
        return plain.contiguous().view(sys.modules["torch"].uint8)

    def copy_to(self, out: memoryview) -> None:
        torch = sys.modules["torch"]
        torch.frombuffer(out, dtype=torch.uint8).copy_(self.flat())

    def on_host(self) -> memoryview:
        return memoryview(self.flat().cpu().numpy().data)


def tensor_bytes(value: Any, start: int = 0, count: int | None = None) -> memoryview:
    """A tensor's or array's elements, row-major. Aliases its memory where that is contiguous and on the CPU.

    Args:
        start, count: which elements, of the dtype that `describe` names; no others are copied from a device.
    """
    if not is_tensor(value):
        import numpy

        item_bytes = value.itemsize if value.dtype.str in _NUMPY_WORDS else 1
        content = memoryview(numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8).data)
        return content[start * item_bytes :][: None if count is None else count * item_bytes]
    if value.numel() == 0 or count == 0:
        return memoryview(b"")
    uint8 = sys.modules["torch"].uint8
    if aliases(value):
        whole = memoryview(value.detach().view(-1).view(uint8).numpy().data)
        item_bytes = value.element_size()
        return whole[start * item_bytes : None if count is None else (start + count) * item_bytes]
    plain = value.detach().resolve_conj().resolve_neg().reshape(-1)
    plain = plain[start : None if count is None else start + count].cpu().contiguous()
    return memoryview(plain.view(uint8).numpy().data)


def borrowed(view: memoryview) -> memoryview:
    """The same writable bytes, without keeping them there: not to be touched unless something else does."""
    if not view.nbytes:
        return view
    array = ctypes.c_ubyte * view.nbytes
    return memoryview(array.from_address(ctypes.addressof(ctypes.c_ubyte.from_buffer(view)))).cast("B")


def digests(values: Sequence[tuple[Any, bool]]) -> list[int]:
    """A number below 2 ** 62 for each tensor or array, by which ranks tell whether they hold the same bytes.

    What lies on a device is summed up there: its bytes do not come to the host.

    Args:
        values: with each, whether all of it counts, or but a block at either end.
    """
    found: list[Any] = [_digest(value, whole) for value, whole in values]
    on_device = [index for index, each in enumerate(found) if type(each) is not int]
    if on_device:
        import torch

        by_device: dict[Any, list[int]] = {}
        for index in on_device:
            by_device.setdefault(found[index].device, []).append(index)
        for indexes in by_device.values():  # one transfer each, not one for each tensor
            sums = torch.stack([found[index] for index in indexes]).tolist()
            for index, value in zip(indexes, sums, strict=True):
                found[index] = value & _DIGEST_MASK
    return found


def _digest(value: Any, whole: bool) -> Any:
    if is_tensor(value) and _on_device(value):
        flat = value.detach().resolve_conj().resolve_neg().reshape(-1)
        return _sum_on_device(flat if whole else _ends(flat))
    if whole:
        return crc32c(tensor_bytes(value))
    if is_tensor(value) and not aliases(value):
        return crc32c(tensor_bytes(_ends(value.detach().reshape(-1))))
    content = tensor_bytes(value)
    return crc32c(content[:BLOCK_BYTES]) << 30 ^ crc32c(content[-BLOCK_BYTES:])


def _ends(flat: Any) -> Any:
    import torch

    count = BLOCK_BYTES // flat.element_size()
    return flat if len(flat) <= 2 * count else torch.cat([flat[:count], flat[-count:]])


def _sum_on_device(flat: Any) -> Any:
    """A 0-d int64: the sum of all bytes, each times an odd number that its place gives (a polynomial's value would
    need every product modulo a prime; here 2 ** 64 overflows as it should)."""
    import torch

    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    content = flat.view(torch.uint8)
    place = torch.arange(min(_SUMMED_BYTES, len(content)), dtype=torch.int64, device=flat.device)
    weights = (place + 1) * _MIX[0]
    weights = ((weights ^ (weights >> 29)) * _MIX[1]) | 1
    for part in content.split(_SUMMED_BYTES):
        total = total * _MIX[0] + (part.to(torch.int64) * weights[: len(part)]).sum()
    return total


def allocate(ref: TensorRef, device: str) -> Any:
    """A new tensor or array of `ref`, whose elements are yet to be filled.

    Args:
        device: where it goes when it was not on the CPU.
    """
    if ref.numpy is not None:
        import numpy

        dtype, shape = ref.numpy
        return numpy.empty(shape, dtype=dtype)
    import torch

    where = "cpu" if ref.device == "cpu" else device
    tensor = torch.empty(ref.shape, dtype=getattr(torch, ref.dtype), device=where)
    if ref.kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=ref.grad)
    if ref.kind == "buffer":
        return torch.nn.Buffer(tensor)
    return tensor.requires_grad_(ref.grad)


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
