"""NVIDIA devices, with NCCL."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from cfe_hpc.devices.base import Memory, RankPlace, thread_limits
from cfe_hpc.devices.cuda_copies import CudaCopies
from cfe_hpc.errors import ImpossibleError, Problem

if TYPE_CHECKING:
    import torch

__all__ = ["Cuda"]


class Cuda:
    """See devices.base.Device for each call's contract."""

    name: Literal["cuda"] = "cuda"
    backend = "nccl"

    def environment(self, place: RankPlace, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        # CUDA_VISIBLE_DEVICES is the scheduler's: with --gpus-per-task it shows each rank one device, otherwise
        # all of the job's on this node. `_index` reads both.
        env = os.environ if environ is None else environ
        return {"DS_ACCELERATOR": "cuda", **thread_limits(env)}

    def activate(self, local_rank: int) -> None:
        import torch

        torch.cuda.set_device(self._index(local_rank))

    def torch_device(self, local_rank: int) -> str:
        return f"cuda:{self._index(local_rank)}"

    def _index(self, local_rank: int) -> int:
        import torch

        count = torch.cuda.device_count()
        if count == 1:
            return 0
        if local_rank >= count:
            raise ImpossibleError(
                [
                    Problem(
                        file=socket.gethostname(),
                        key="CUDA_VISIBLE_DEVICES",
                        what=f"{count} devices are visible, too few for local rank {local_rank}",
                        value=os.environ.get("CUDA_VISIBLE_DEVICES", "not set"),
                        remedy="ask for as many devices as ranks on each node (resources.devices_per_node), "
                        "and check that torch is a CUDA build that fits the driver",
                    )
                ]
            )
        return local_rank

    def init_process_group(self, place: RankPlace) -> None:
        import torch
        import torch.distributed as dist

        device = torch.device(self.torch_device(place.local_rank))
        dist.init_process_group(self.backend, rank=place.rank, world_size=place.world_size, device_id=device)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def mark_step(self) -> None:
        return None

    def copies(self) -> CudaCopies:
        return CudaCopies()

    def rng_state(self) -> torch.Tensor | None:
        import torch

        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: torch.Tensor | None) -> None:
        import torch

        if state is not None:
            torch.cuda.set_rng_state(state)

    def memory(self) -> Memory:
        import torch

        limit_bytes = torch.cuda.mem_get_info()[1]
        return Memory(
            used_bytes=torch.cuda.memory_allocated(),
            peak_bytes=torch.cuda.max_memory_allocated(),
            limit_bytes=limit_bytes,
        )
