"""Intel Gaudi, with HCCL. Contract-tested against a fake bridge; never executed on the hardware.

Slurm counts devices by index; the bridge wants module ids (their place on the board), and a node's two orders need
not agree. Slurm's stock GRES sets no HABANA_* variable, so a job on part of a node names its modules here.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from cfe_hpc.devices.base import Memory, RankPlace, thread_limits
from cfe_hpc.errors import ImpossibleError, Problem
from cfe_hpc.process import CommandError, run

if TYPE_CHECKING:
    import torch

__all__ = ["Gaudi", "device_indices", "parse_modules", "read_modules"]

_HL_SMI = ("hl-smi", "-Q", "index,module_id", "-f", "csv")
_HL_SMI_TIMEOUT_S = 30.0

# The step's own list first. CUDA_VISIBLE_DEVICES comes last: where Slurm confines devices it counts from 0 anew.
_INDEX_VARIABLES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")


def parse_modules(shown: str) -> dict[int, int]:
    """Device index to module id, from `hl-smi -Q index,module_id -f csv`, in whatever order it lists them."""
    rows = re.findall(r"^\s*(\d+)\s*,\s*(\d+)\s*$", shown, re.MULTILINE)
    return {int(index): int(module) for index, module in rows}


def read_modules() -> dict[int, int]:
    """This node's device indices and module ids, from hl-smi; empty when it is missing or fails."""
    try:
        return parse_modules(run(_HL_SMI, timeout_s=_HL_SMI_TIMEOUT_S).stdout)
    except CommandError:
        return {}


def device_indices(environ: Mapping[str, str]) -> list[int] | None:
    """Indices of the devices that the scheduler gave this step on this node; None when it says nothing.

    Lists ("0,2"), ranges ("0-3") and both are read.
    """
    text = next((environ[name] for name in _INDEX_VARIABLES if environ.get(name)), "")
    indices: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            return None
        first = int(match.group(1))
        indices += range(first, int(match.group(2) or first) + 1)
    return indices or None


class Gaudi:
    """See devices.base.Device for each call's contract."""

    name: Literal["hpu"] = "hpu"
    backend = "hccl"

    def __init__(self, modules: Callable[[], dict[int, int]] = read_modules) -> None:
        self._read_modules = modules

    def environment(self, place: RankPlace, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        env = os.environ if environ is None else environ
        # Releases differ in the default (lazy in older ones, eager in newer): a run must not depend on it.
        lazy = env.get("PT_HPU_LAZY_MODE", "0")
        variables = {"DS_ACCELERATOR": "hpu", "PT_HPU_LAZY_MODE": lazy, **thread_limits(env)}
        if "HABANA_VISIBLE_MODULES" not in env:
            modules = self._visible_modules(place, device_indices(env))
            if modules is not None:
                variables["HABANA_VISIBLE_MODULES"] = ",".join(map(str, modules))
        return variables

    def _visible_modules(self, place: RankPlace, indices: list[int] | None) -> list[int] | None:
        """Module ids by local rank (ascending); None when the scheduler confines nothing."""
        if indices is None:
            return None
        known = self._read_modules()
        unknown = [index for index in indices if index not in known]
        if unknown:
            what = f"module ids of devices {_listed(unknown)} are not known: hl-smi shows {len(known)} devices"
            raise _cannot_place(what, _listed(indices), "check that hl-smi works on this node")
        if len(indices) < place.local_world_size:
            what = f"{len(indices)} devices for {place.local_world_size} ranks on this node"
            raise _cannot_place(what, _listed(indices), "ask for one device a rank (resources.devices_per_node)")
        return sorted(known[index] for index in indices)

    def activate(self, local_rank: int) -> None:
        import habana_frameworks.torch.core  # noqa: F401 (registers the device with torch)

    def torch_device(self, local_rank: int) -> str:
        # The bridge gives each process one device, by HLS_MODULE_ID: it is always the process's first.
        return "hpu"

    def init_process_group(self, place: RankPlace) -> None:
        import torch.distributed as dist
        from habana_frameworks.torch.distributed import hccl

        hccl.initialize_distributed_hpu(world_size=place.world_size, rank=place.rank, local_rank=place.local_rank)
        dist.init_process_group(self.backend, rank=place.rank, world_size=place.world_size)

    def synchronize(self) -> None:
        import habana_frameworks.torch.hpu as hpu

        hpu.synchronize()

    def mark_step(self) -> None:
        if os.environ.get("PT_HPU_LAZY_MODE") == "1":
            import habana_frameworks.torch.core as htcore

            htcore.mark_step()

    def copies(self) -> None:
        # The bridge pins what it allocates itself (tensor.pin_memory("hpu")); it has no call for memory that is there,
        # such as a checkpoint's, which a second process reads.
        return None

    def rng_state(self) -> torch.Tensor | None:
        import habana_frameworks.torch.hpu as hpu

        state: torch.Tensor = hpu.random.get_rng_state()
        return state.cpu()

    def set_rng_state(self, state: torch.Tensor | None) -> None:
        import habana_frameworks.torch.hpu as hpu

        if state is not None:
            hpu.random.set_rng_state(state)

    def memory(self) -> Memory:
        import habana_frameworks.torch.hpu as hpu

        stats = hpu.memory_stats()
        return Memory(used_bytes=stats["InUse"], peak_bytes=stats["MaxInUse"], limit_bytes=stats["Limit"])


def _listed(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _cannot_place(what: str, value: str, remedy: str) -> ImpossibleError:
    place = socket.gethostname()
    return ImpossibleError([Problem(file=place, key="SLURM_STEP_GPUS", what=what, value=value, remedy=remedy)])
