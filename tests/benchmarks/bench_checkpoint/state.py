"""What is saved: GPT-2 small's tensors at any size, parameters with Adam's moments, each rank holding rows of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cfe_hpc.checkpoints.protocols import Piece, ReadInto

KINDS = ("model", "exp_avg", "exp_avg_sq")
LAYERS = 12
VOCABULARY = 50257
POSITIONS = 1024
STATE_BYTES_PER_PARAMETER = 12


def shapes(state_bytes: int) -> dict[str, tuple[int, ...]]:
    """Parameters of about `state_bytes` / 12 elements: GPT-2 small's 148 at 768, narrower or wider."""
    width = 8
    while STATE_BYTES_PER_PARAMETER * _parameters(width + 8) <= state_bytes * 1.01:
        width += 8
    return dict(_shapes(width))


def _shapes(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "wte.weight", (VOCABULARY, width)
    yield "wpe.weight", (POSITIONS, width)
    for layer in range(LAYERS):
        matrices = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
        matrices |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for name, shape in matrices.items():
            yield f"h.{layer}.{name}.weight", shape
            yield f"h.{layer}.{name}.bias", shape[:1]
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            yield f"h.{layer}.{name}", (width,)
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def _parameters(width: int) -> int:
    return sum(torch.Size(shape).numel() for _, shape in _shapes(width))


class ShardedState:
    """This rank's rows of each tensor, as FSDP2 divides them; a `protocols.Sharded`.

    Each element holds its own number, so that what was loaded can be told from what was not, on any ranks.
    """

    def __init__(self, state_bytes: int, rank: int, size: int, mesh: Any) -> None:
        self.locals: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.first_row: dict[str, int] = {}
        self._mesh = mesh
        for kind, (name, shape) in itertools.product(KINDS, shapes(state_bytes).items()):
            rows = -(-shape[0] // size)
            low, high = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
            full = f"{kind}/{name}"
            self.shapes[full], self.first_row[full] = shape, low
            self.locals[full] = torch.empty((high - low, *shape[1:]))
        self.fill()

    @property
    def size_bytes(self) -> int:
        """Bytes of this rank's rows."""
        return sum(local.nbytes for local in self.locals.values())

    def fill(self) -> None:
        """Give each element its number."""
        for name, local in self.locals.items():
            torch.arange(*self._numbers(name), dtype=torch.int32, out=local.view(-1).view(torch.int32))

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        for local in self.locals.values():
            local.zero_()

    def check(self) -> None:
        """Raises ValueError when an element does not hold its number."""
        for name, local in self.locals.items():
            if not torch.equal(local.view(-1).view(torch.int32), torch.arange(*self._numbers(name), dtype=torch.int32)):
                raise ValueError(f"{name} was not loaded as it was saved")

    def _numbers(self, name: str) -> tuple[int, int]:
        first = self._start(name) + list(self.shapes).index(name) + 1
        return first, first + self.locals[name].numel()

    def _start(self, name: str) -> int:
        return self.first_row[name] * torch.Size(self.shapes[name][1:]).numel()

    def dtensors(self) -> dict[str, Any]:
        """The same memory as DTensors, for torch's distributed checkpoints."""
        from torch.distributed.tensor import DTensor, Shard

        made = {}
        for name, local in self.locals.items():
            shape = torch.Size(self.shapes[name])
            stride = torch.empty(shape, device="meta").stride()
            made[name] = DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return made

    def checkpoint_layout(self) -> dict[str, Any]:
        return {"engine": "rows"}

    def checkpoint_state(self) -> tuple[list[Piece], Any]:
        pieces = [
            Piece(
                name=name,
                dtype="float32",
                shape=self.shapes[name],
                start=self._start(name),
                data=bytes_of(local),
                steady=True,
            )
            for name, local in self.locals.items()
        ]
        return pieces, None

    def load_checkpoint_state(self, reader: ReadInto, tree: Any) -> None:
        for name, local in self.locals.items():
            reader.enqueue(name, self._start(name), bytes_of(local))
        reader.flush()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
