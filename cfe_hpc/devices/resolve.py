"""Which kind of device this process uses, and why; decided from this node alone, without loading torch."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cfe_hpc.config.job import Accelerator
from cfe_hpc.devices.base import Device
from cfe_hpc.devices.cpu import Cpu
from cfe_hpc.devices.cuda import Cuda
from cfe_hpc.devices.gaudi import Gaudi
from cfe_hpc.devices.probe import Finding, probe
from cfe_hpc.errors import ImpossibleError, Problem

__all__ = ["DEVICES", "Choice", "resolve"]

# A device is added by one row here and one in devices.probe.
DEVICES: dict[Accelerator, Callable[[], Device]] = {"cuda": Cuda, "hpu": Gaudi, "cpu": Cpu}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The device and the reason for it, a sentence for the log."""

    device: Device
    reason: str


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
