"""What a run has measured of itself, and what follows from it: the signal's lead, what a grace must hold, how often to
save where it cannot. Arithmetic alone: `submit` imports it, and must stay quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SLURM_SLACK_S", "Measured", "need_s", "save_interval_s", "signal_lead_s"]

SLURM_SLACK_S = 60.0
"""Slurm sends the signal before the time limit up to so much early, and its clock for limits ticks as slowly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run has measured of itself.

    Attributes:
        step_p95_s: a step, the 95th of 100.
        save_p95_s: a checkpoint, from its beginning until it is committed.
        blocked_p95_s: the part of that for which training waited.
        interruptions: attempts that were ended from outside or by an error, without warning.
        trained_s: time in the loop, over all attempts.
    """

    step_p95_s: float
    save_p95_s: float
    blocked_p95_s: float
    interruptions: int
    trained_s: float


def signal_lead_s(measured: Measured) -> int:
    """Seconds before the time limit at which Slurm is to send its signal."""
    return math.ceil(need_s(measured) + SLURM_SLACK_S)


def need_s(measured: Measured) -> float:
    """Seconds from a signal to a committed checkpoint: what a grace must hold."""
    return measured.step_p95_s + measured.save_p95_s


def save_interval_s(measured: Measured) -> float:
    """Seconds from one save to the next that lose the least time, by Young and Daly: saving more often costs more
    than it keeps. Never less than twice what a save costs."""
    between_s = measured.trained_s / max(1, measured.interruptions)
    return max(2 * measured.blocked_p95_s, math.sqrt(2 * measured.blocked_p95_s * between_s))
