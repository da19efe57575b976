"""Tensors filled from a checkpoint: those on the CPU in place, those on a device by way of bounded buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from cfe_hpc.checkpoints.protocols import ReadInto
from cfe_hpc.checkpoints.state.tensors import aliases, dtype_name, tensor_bytes
from cfe_hpc.errors import CheckpointMismatch

__all__ = ["Landing"]

LANDING_BYTES = 64 << 20
"""Host memory that waits for a device at a time: large enough for the disk, small beside any model."""


class Landing:
    """Collects what is to be read; all of it is there after `flush`.

    Nothing is copied on a CPU: the reader fills the tensor's own memory.
    """

    def __init__(self, reader: ReadInto, *, alike: bool = False) -> None:
        """`alike` is `ReadInto.flush`'s."""
        self._reader, self._alike = reader, alike
        self._landed: list[tuple[Tensor, Tensor]] = []
        self._landed_bytes = 0

    def fill(self, name: str, start: int, target: Tensor) -> None:
        """Have `target` filled with the elements of `name` from `start` on.

        Raises:
            CheckpointMismatch: it is of another dtype in the checkpoint, or there is no such interval.
            CorruptCheckpoint: bytes of what was collected before are not those that were written.
        """
        dtype, _ = self._reader.describe(name)
        if dtype != dtype_name(target.dtype):
            raise CheckpointMismatch(f"{name} is {dtype} in the checkpoint and {dtype_name(target.dtype)} here")
        if target.numel() == 0:
            return
        if aliases(target):
            self._reader.enqueue(name, start, tensor_bytes(target))
            return
        # A view of a tensor that is not contiguous need not exist: only a whole one lands in one piece.
        size = LANDING_BYTES // target.element_size()
        pieces = torch.split(target.view(-1), size) if target.is_contiguous() else (target,)
        for piece in pieces:
            self._land(name, start, piece)
            start += piece.numel()

    def _land(self, name: str, start: int, target: Tensor) -> None:
        size_bytes = target.numel() * target.element_size()
        if self._landed_bytes + size_bytes > LANDING_BYTES:
            self.flush()
        landed = torch.empty(target.shape, dtype=target.dtype)
        self._reader.enqueue(name, start, tensor_bytes(landed))
        self._landed.append((landed, target))
        self._landed_bytes += size_bytes

    def flush(self) -> None:
        """Read what was collected. Raises CorruptCheckpoint."""
        self._reader.flush(alike=self._alike)
        for landed, target in self._landed:
            target.copy_(landed)
        self._landed.clear()
        self._landed_bytes = 0
