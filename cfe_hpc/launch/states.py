"""Schedulers' words for what a job is doing, translated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["JobState", "RunState", "run_state"]

RunState = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "HELD", "UNKNOWN"]

_SLURM: dict[str, RunState] = {
    "PENDING": "PENDING",
    "CONFIGURING": "PENDING",
    "REQUEUED": "PENDING",
    "REQUEUE_FED": "PENDING",
    "RUNNING": "RUNNING",
    "COMPLETING": "RUNNING",
    "RESIZING": "RUNNING",
    "SIGNALING": "RUNNING",
    "STAGE_OUT": "RUNNING",
    "STOPPED": "RUNNING",
    "SUSPENDED": "RUNNING",
    "COMPLETED": "COMPLETED",
    "BOOT_FAIL": "FAILED",
    "DEADLINE": "FAILED",
    "FAILED": "FAILED",
    "NODE_FAIL": "FAILED",
    "OUT_OF_MEMORY": "FAILED",
    "PREEMPTED": "FAILED",
    "TIMEOUT": "FAILED",
    "CANCELLED": "CANCELLED",
    "REVOKED": "CANCELLED",
    "REQUEUE_HOLD": "HELD",
    "RESV_DEL_HOLD": "HELD",
    "SPECIAL_EXIT": "HELD",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What a scheduler says of one job.

    Attributes:
        state: in our words; UNKNOWN for a word we do not know.
        word: in the scheduler's own.
        reason: why it waits or ended, in the scheduler's words; "" when it says nothing.
        nodes: its nodes, as the scheduler spells them; "" while it has none.
        start: when it started or is expected to, as the scheduler prints it; None when it does not say.
    """

    job_id: str
    state: RunState
    word: str
    reason: str = ""
    nodes: str = ""
    start: str | None = None


def run_state(word: str, reason: str = "") -> RunState:
    """Our word for Slurm's: a pending job that somebody or a failed launch holds is HELD."""
    state = _SLURM.get(word.split(" ")[0].rstrip("+"), "UNKNOWN")
    return "HELD" if state == "PENDING" and "held" in reason.lower() else state
