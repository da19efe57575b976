"""Cores, with gloo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from cfe_hpc.devices.base import Memory, RankPlace, thread_limits

if TYPE_CHECKING:
    import torch

__all__ = ["Cpu"]


class Cpu:
    """See devices.base.Device for each call's contract."""

    name: Literal["cpu"] = "cpu"
    backend = "gloo"

    def environment(self, place: RankPlace, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        env = os.environ if environ is None else environ
        # DeepSpeed takes whatever accelerator it finds unless told: a cpu job on a GPU node would end on the GPU.
        return {"DS_ACCELERATOR": "cpu", **thread_limits(env)}

    def activate(self, local_rank: int) -> None:
        return None

    def torch_device(self, local_rank: int) -> str:
        return "cpu"

    def init_process_group(self, place: RankPlace) -> None:
        import torch.distributed as dist

        dist.init_process_group(self.backend, rank=place.rank, world_size=place.world_size)

    def synchronize(self) -> None:
        return None

    def mark_step(self) -> None:
        return None

    def copies(self) -> None:
        return None

    def rng_state(self) -> torch.Tensor | None:
        return None

    def set_rng_state(self, state: torch.Tensor | None) -> None:
        return None

    def memory(self) -> Memory:
        return Memory(used_bytes=0, peak_bytes=0, limit_bytes=0)
