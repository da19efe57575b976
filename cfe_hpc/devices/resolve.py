"""Which kind of device this process uses, and why; decided from this node alone, without loading torch."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from shutil import which

from cfe_hpc.config.job import Accelerator
from cfe_hpc.devices.base import Device
from cfe_hpc.devices.cpu import Cpu
from cfe_hpc.devices.cuda import Cuda
from cfe_hpc.devices.gaudi import Gaudi
from cfe_hpc.errors import ImpossibleError, Problem

__all__ = ["DEVICES", "Choice", "Finding", "probe", "resolve"]

# In order of preference when the job names none. A device is added by one row here and one in `_LOOKS`.
DEVICES: dict[Accelerator, Callable[[], Device]] = {"cuda": Cuda, "hpu": Gaudi, "cpu": Cpu}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Whether this node has a kind of device, and what says so."""

    present: bool
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The device and the reason for it, a sentence for the log."""

    device: Device
    reason: str


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
    return {name: _LOOKS[name]() for name in DEVICES}


def resolve(wanted: Accelerator | None, findings: Mapping[Accelerator, Finding] | None = None) -> Choice:
    """The device for this process.

    Args:
        wanted: the accelerator that the job and its site agreed on; the best one of this node when None.
        findings: what the node has; probed when None.

    Raises:
        ImpossibleError: this node does not have what is wanted.
    """
    found = probe() if findings is None else findings
    if wanted is None:
        best = next(name for name, finding in found.items() if finding.present)
        passed = [f"{name}: {finding.evidence}" for name, finding in found.items() if not finding.present]
        reason = "; ".join([f"the best of this node ({found[best].evidence})", *passed])
        return Choice(device=DEVICES[best](), reason=reason)
    if not found[wanted].present:
        has = ", ".join(name for name, finding in found.items() if finding.present)
        raise ImpossibleError(
            [
                Problem(
                    file=socket.gethostname(),
                    key="resources.accelerator",
                    what=f"this node has no usable {wanted} device: {found[wanted].evidence}",
                    value=wanted,
                    remedy=f"choose a partition whose nodes have one, or another accelerator (here: {has})",
                )
            ]
        )
    return Choice(device=DEVICES[wanted](), reason=f"asked for by the job's plan ({found[wanted].evidence})")
