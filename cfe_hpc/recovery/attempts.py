"""A run's attempts, read back from its events: where each started, what it saved, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

__all__ = ["KILLED", "Attempt", "Cause", "epoch_s", "read_attempts"]

KILLED = "killed"
"""`detail` of a `failed` event whose reason is a signal from outside, no error of the job's own."""

Cause = Literal["preempted", "time_limit", "requeue_requested", "node_failure", "cancelled", "failed"]

_CAUSES: dict[str, Cause] = {
    "preempted": "preempted",
    "time_limit": "time_limit",
    "requeue_requested": "requeue_requested",
    "requeued_already": "requeue_requested",
    "node_failure": "node_failure",
    "failed": "failed",
}


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One allocation of a run, as far as its events tell. Steps are counts of steps done; times are epoch seconds.

    Attributes:
        started_s: when its rank 0's process began: `started` is said only once torch is loaded and the model built.
        resumed_from: steps done when it took up the work; None when it never came so far, or says nothing of it.
        saved_step: newest step it committed a checkpoint of.
        last_step: newest step any of its events names.
        counts_steps: it has said something about steps at all; a plain `command` job never does.
        ended_by: None while nothing says that it ended.
        error: the first error it reported, or how it died without one.
        killed: it died by a signal from outside, which says nothing about the job itself.
        requeued: another attempt was asked for or promised.
    """

    number: int
    job_id: str | None = None
    host: str | None = None
    total_steps: int | None = None
    started_s: float | None = None
    last_sign_s: float = 0.0
    resumed_from: int | None = None
    saved_step: int | None = None
    last_step: int | None = None
    counts_steps: bool = False
    ended_by: Cause | Literal["completed", "held"] | None = None
    error: str | None = None
    killed: bool = False
    requeued: bool = False

    @property
    def gained(self) -> bool:
        """Whether it left the run further than it found it."""
        return (self.saved_step or 0) > (self.resumed_from or 0)


def epoch_s(stamp: Any) -> float | None:
    """Seconds since the epoch of an RFC 3339 time; None for anything else."""
    try:
        return datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def read_attempts(events: Iterable[dict[str, Any]]) -> list[Attempt]:
    """The attempts in the order of their numbers. Events without an attempt (`submitted`) are passed over.

    An attempt that ended without a word and has a successor was ended by a signal that its ranks still wrote down
    (taken for a preemption), or by its node.
    """
    found: dict[int, Attempt] = {}
    signalled: set[int] = set()
    for event in events:
        number = event.get("attempt")
        if not isinstance(number, int):
            continue
        attempt = found.setdefault(number, Attempt(number=number))
        if event.get("event") == "signal":
            signalled.add(number)
        _take(attempt, event)
    attempts = [found[number] for number in sorted(found)]
    for attempt in attempts[:-1]:
        # Whoever follows up on a failure writes `requeued`. Where nobody did, the scheduler took the job back by
        # itself: the errors are those of ranks whose peers were gone.
        if attempt.ended_by is None or (attempt.ended_by == "failed" and not attempt.requeued):
            attempt.ended_by = "preempted" if attempt.number in signalled else "node_failure"
    return attempts


def _take(attempt: Attempt, event: dict[str, Any]) -> None:
    """Add one event of the attempt to what is known of it."""
    name, step, detail = event.get("event"), event.get("step"), event.get("detail")
    attempt.last_sign_s = max(attempt.last_sign_s, epoch_s(event.get("time")) or 0.0)
    if isinstance(step, int):
        attempt.counts_steps = True
        attempt.last_step = max(attempt.last_step or 0, step)
    if name == "started":
        facts = detail if isinstance(detail, dict) else {}
        if attempt.started_s is None and (said_s := epoch_s(event.get("time"))) is not None:
            attempt.started_s = said_s - _seconds(facts.get("startup_seconds"))
        attempt.host = event.get("host")
        attempt.job_id = facts.get("job_id", attempt.job_id)
        attempt.total_steps = facts.get("total_steps", attempt.total_steps)
        attempt.counts_steps = attempt.counts_steps or attempt.total_steps is not None
    elif name == "resumed" and isinstance(step, int):
        attempt.resumed_from = step
    elif name == "checkpoint_saved" and isinstance(step, int):
        attempt.saved_step = max(attempt.saved_step or 0, step)
    elif name == "failed":
        attempt.error = attempt.error or str(event.get("reason", ""))
        attempt.killed = attempt.killed or detail == KILLED
        attempt.ended_by = attempt.ended_by or "failed"
    elif name == "requeued":
        attempt.requeued = True
        attempt.ended_by = _CAUSES.get(str(event.get("reason")), attempt.ended_by or "requeue_requested")
    elif name == "preempted":
        attempt.ended_by = "preempted"
    elif name in ("cancelled", "completed", "held"):
        attempt.ended_by = name
