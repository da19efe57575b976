"""A rank's reads of one checkpoint: noted first, into the memory where the elements belong, then done in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfe_hpc.checkpoints.codec import TensorRef
from cfe_hpc.checkpoints.protocols import ReadInto
from cfe_hpc.checkpoints.state.dtensors import is_dtensor, local_part, start_of
from cfe_hpc.checkpoints.state.tensors import allocate, identity, is_tensor, tensor_bytes

__all__ = ["Filling"]


class Filling:
    """What is to be filled from a checkpoint.

    Nothing is copied that is on the CPU and contiguous: its own memory is read into. What is on a device, or lies
    scattered, is filled by way of bounded buffers.
    """

    def __init__(self, own: ReadInto, shared: ReadInto, *, device: str, alike: bool) -> None:
        """Note nothing yet.

        Args:
            own: tensors of this rank alone; they come before shared ones of the same name.
            device: where new tensors go that were saved from an accelerator.
            alike: whether the other ranks read the same whole tensors at this time.
        """
        self._own, self._shared, self._device, self._alike = own, shared, device, alike
        self._mine = set(own.names())
        self._noted: dict[tuple[Any, ...], tuple[str, Any]] = {}

    def fill(self, name: str, target: Any) -> None:
        """Have a tensor or array, of the stored dtype and shape, filled; of a DTensor, what this rank holds of it.

        Memory that is named twice is filled with what was asked for last.
        """
        self._noted[identity(target)] = (name, target)

    def new(self, ref: TensorRef) -> Any:
        """A new tensor or array of `ref`, filled at the next `flush`; what `codec.decode` makes tensors with."""
        made = allocate(ref, self._device)
        self.fill(ref.name, made)
        return made

    def flush(self) -> None:
        """Read everything that was noted.

        Raises:
            CheckpointMismatch: a tensor is not in the checkpoint.
            CorruptCheckpoint: bytes are not those that were written; targets may be filled in part.
        """
        noted, self._noted = list(self._noted.values()), {}
        mine = [(name, target) for name, target in noted if name in self._mine]
        others = [(name, target) for name, target in noted if name not in self._mine]
        # Shards of a DTensor are each rank's own: going by way of the page cache would serve nobody.
        alike = self._alike and not any(is_dtensor(target) for _, target in others)
        _fill(self._own, mine, alike=False)
        _fill(self._shared, others, alike=alike)


def _fill(reader: ReadInto, noted: Sequence[tuple[str, Any]], *, alike: bool) -> None:
    arrays = [(name, target) for name, target in noted if not is_tensor(target)]
    for name, target in arrays:
        if target.nbytes:
            reader.enqueue(name, 0, tensor_bytes(target))
    if len(arrays) == len(noted):
        reader.flush(alike=alike)
        return
    import torch

    from cfe_hpc.checkpoints.state.landing import Landing

    landing = Landing(reader, alike=alike)
    with torch.no_grad():
        for name, target in noted:
            if is_tensor(target):
                sharded = is_dtensor(target)
                landing.fill(name, start_of(target, name) if sharded else 0, local_part(target) if sharded else target)
        landing.flush()
