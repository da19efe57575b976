"""The backend "hccl", over gloo; and the choice of a module for each local rank, by the real bridge's rule."""

import os

import torch.distributed as dist

from habana_frameworks.torch.hpu import HABANA_VISIBLE_MODULES_VAR, HLS_MODULE_ID_VAR


def initialize_distributed_hpu(world_size: int, rank: int, local_rank: int) -> tuple[int, int, int]:
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(local_rank), ID=str(rank))
    if HLS_MODULE_ID_VAR not in os.environ and world_size > 1:
        visible = os.environ.get(HABANA_VISIBLE_MODULES_VAR)
        module = visible.split(",")[local_rank] if visible else str(local_rank)
        os.environ[HLS_MODULE_ID_VAR] = module
    return world_size, rank, local_rank


def _gloo(store: dist.Store, rank: int, size: int, timeout: object) -> object:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


dist.Backend.register_backend("hccl", _gloo, devices=["cpu"])
