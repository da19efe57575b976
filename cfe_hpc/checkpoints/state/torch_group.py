"""A torch.distributed process group as a `Group`: for agreeing where only the training's own ranks are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

__all__ = ["TorchGroup"]


class TorchGroup:
    """`protocols.Group` over a process group of any backend."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def all_max(self, values: Sequence[int]) -> list[int]:
        return [max(column) for column in zip(*self._gather(list(values)), strict=True)]

    def all_gather(self, data: bytes) -> list[bytes]:
        return self._gather(data)

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        sent: bytes = self._gather(data if self.rank == source else b"")[source]
        return sent

    def barrier(self) -> None:
        self._gather(None)

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered
