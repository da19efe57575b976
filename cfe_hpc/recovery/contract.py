"""The preemption contract: what a site does to a job that it wants out of the way, and what cfe_hpc does about it.

On Slurm before 24.05 a job that exits within its grace time is lost; from 24.05 on it is requeued, and held after a
few times. So an attempt never exits for it: it asks for the requeue itself, or stays until the kill.
"""

from __future__ import annotations

import re
from typing import Literal

from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Site
from cfe_hpc.recovery.measured import Measured, need_s
from cfe_hpc.units import format_duration, format_seconds

__all__ = ["exit_in_grace", "fits", "sentence", "time_to_save_s"]

_REQUEUED_SINCE = (24, 5)
_BATCH_REQUEUES = 5
"""Exits that Slurm takes for a requeue before it holds a job, where the site does not say (MaxBatchRequeue)."""


def exit_in_grace(version: str | None) -> Literal["lost", "requeued", "unknown"]:
    """What becomes of a job that exits within its grace time.

    Args:
        version: Slurm's, as a profile states it.
    """
    match = re.match(r"(\d+)\.(\d+)", version or "")
    if match is None:
        return "unknown"
    return "requeued" if (int(match[1]), int(match[2])) >= _REQUEUED_SINCE else "lost"


def time_to_save_s(plan: Plan, site: Site) -> float | None:
    """Seconds from the signal of a preemption to the kill; None where no attempt is ended by one.

    Without a grace time that is KillWait: Slurm then requeues or cancels at once, and its processes get TERM first.
    """
    return (plan.preemption.grace or site.slurm.kill_wait) if plan.preemption.ends_attempts else None


def fits(plan: Plan, site: Site, measured: Measured | None) -> bool | None:
    """Whether a step and a save fit in the time that a preemption leaves; None where no attempt is ended by one, or
    nothing has been measured."""
    room_s = time_to_save_s(plan, site)
    return None if measured is None or room_s is None else need_s(measured) <= room_s


def sentence(plan: Plan, site: Site, measured: Measured | None) -> str:
    """One line for people: the signal, the seconds, what the site does then, and what cfe_hpc does."""
    preemption = plan.preemption
    if preemption.mode == "off":
        return "none in this partition"
    if preemption.mode == "suspend":
        return "suspend: Slurm stops the ranks and lets them go on later; nothing has to be saved"
    name = plan.signal if preemption.user_signal else "TERM"
    room = format_duration(time_to_save_s(plan, site) or 0.0)
    told = f"{preemption.mode}: {name}, {room}{'' if preemption.grace else ' (KillWait)'} to save; "
    if site.scheduler == "local":
        then = "all ranks save, the next attempt follows"
    elif preemption.mode == "cancel":
        then = "Slurm cancels the job, a successor goes on in the same run folder"
    else:
        then = f"{_exit(site)}, so all ranks save and the run requeues itself"
    return told + then + _room(plan, site, measured)


def _exit(site: Site) -> str:
    fate = exit_in_grace(site.slurm.version)
    if fate == "lost":
        return f"Slurm {site.slurm.version} forgets a job that exits then"
    if fate == "requeued":
        times = _BATCH_REQUEUES if site.slurm.max_batch_requeue is None else site.slurm.max_batch_requeue
        return f"Slurm {site.slurm.version} requeues a job that exits then, and holds it after {times} times"
    return "Slurm may forget a job that exits then (slurm.version is not set)"


def _room(plan: Plan, site: Site, measured: Measured | None) -> str:
    fit = fits(plan, site, measured)
    if measured is None or fit is None:
        return "; how long a save takes is not known yet"
    verdict = "fits" if fit else "does not fit"
    save, step = format_seconds(measured.save_p95_s), format_seconds(measured.step_p95_s)
    return f"; measured: save {save} + step {step} (p95): {verdict}"
