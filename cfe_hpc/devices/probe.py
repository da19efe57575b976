"""Which kinds of device this node has, and what says so. Loads nothing: the login side may ask too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from shutil import which

from cfe_hpc.config.job import Accelerator

__all__ = ["Finding", "probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Whether this node has a kind of device, and what says so."""

    present: bool
    evidence: str


def _look_for_cuda() -> Finding:
    # The driver's own nodes: nvidia-smi takes a second to say the same. WSL has /dev/dxg instead.
    nodes = sorted(glob("/dev/nvidia[0-9]*")) + glob("/dev/dxg")
    if nodes:
        return Finding(present=True, evidence=f"{len(nodes)} device nodes, {nodes[0]} the first")
    return Finding(present=False, evidence="no /dev/nvidia* on this node")


def _look_for_gaudi() -> Finding:
    nodes = sorted(glob("/dev/accel/accel[0-9]*")) or sorted(glob("/dev/hl[0-9]*"))
    # Some containers show the devices under other names; hl-smi finds them there.
    seen = f"{len(nodes)} device nodes, {nodes[0]} the first" if nodes else which("hl-smi")
    if not seen:
        return Finding(present=False, evidence="no /dev/accel/accel* and no hl-smi on this node")
    if find_spec("habana_frameworks") is None:
        return Finding(present=False, evidence=f"{seen}, but habana_frameworks is not installed")
    return Finding(present=True, evidence=f"{seen}, and habana_frameworks")


def _look_for_cpu() -> Finding:
    return Finding(present=True, evidence="every node has cores")


_LOOKS: dict[Accelerator, Callable[[], Finding]] = {
    "cuda": _look_for_cuda,
    "hpu": _look_for_gaudi,
    "cpu": _look_for_cpu,
}


def probe() -> dict[Accelerator, Finding]:
    """What this node has, kind by kind, in order of preference."""
    return {name: look() for name, look in _LOOKS.items()}
