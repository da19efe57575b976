"""How long a stop takes, learned from what the run has seen: the signal's lead, what a grace must hold, how often to
save where it cannot."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cfe_hpc.files import read_ndjson
from cfe_hpc.recovery.attempts import Attempt, epoch_s, read_attempts
from cfe_hpc.runfolder import RunFolder

__all__ = [
    "SLURM_SLACK_S",
    "Measured",
    "Observations",
    "measure",
    "need_s",
    "observe",
    "save_interval_s",
    "signal_lead_s",
]

SLURM_SLACK_S = 60.0
"""Slurm sends the signal before the time limit up to so much early, and its clock for limits ticks as slowly."""

_TAIL_BYTES = 1 << 18
"""Of heartbeat.ndjson, enough for a thousand lines: how long steps take now, not how long they took last week."""

# Ends that say nothing of how often a run is torn from its nodes: nobody asked, or everybody knew when.
_NO_INTERRUPTION = (None, "completed", "held", "cancelled", "requeue_requested", "time_limit")


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


@dataclass(slots=True)
class Observations:
    """What steps and saves took, newest last, so far as they still tell of the next one."""

    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=512))
    saves_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    blocked_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    interruptions: int = 0
    trained_s: float = 0.0

    def save(self, seconds: float, blocked_seconds: float) -> None:
        """Note a checkpoint, and for how long of its seconds training waited."""
        self.saves_s.append(seconds)
        self.blocked_s.append(blocked_seconds)

    def measured(self) -> Measured | None:
        """The figures; None before there is a step and a save."""
        if not self.steps_s or not self.saves_s:
            return None
        return Measured(
            step_p95_s=round(_p95(self.steps_s), 4),
            save_p95_s=round(_p95(self.saves_s), 4),
            blocked_p95_s=round(_p95(self.blocked_s), 4),
            interruptions=self.interruptions,
            trained_s=round(self.trained_s, 3),
        )


def observe(folder: RunFolder) -> Observations:
    """What the run's attempts have seen so far. Reads events.ndjson, and the end of heartbeat.ndjson."""
    seen, events = Observations(), list(folder.events())
    for event in events:
        if event.get("event") == "checkpoint_saved" and isinstance(seconds := event.get("seconds"), (int, float)):
            blocked = event.get("blocked_seconds")
            seen.save(float(seconds), float(blocked) if isinstance(blocked, (int, float)) else float(seconds))
    last_beat_s = 0.0
    for beat in read_ndjson(folder.heartbeat_path, last_bytes=_TAIL_BYTES):
        last_beat_s = epoch_s(beat.get("time")) or last_beat_s
        if isinstance(seconds := beat.get("step_seconds"), (int, float)):
            seen.steps_s.append(float(seconds))
    attempts = read_attempts(events)
    seen.interruptions = sum(attempt.ended_by not in _NO_INTERRUPTION for attempt in attempts)
    seen.trained_s = _trained_s(attempts, events, last_beat_s)
    return seen


def measure(folder: RunFolder) -> Measured | None:
    """What the run has measured of itself so far; None before its first step and its first save."""
    return observe(folder).measured()


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


def _p95(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def _trained_s(attempts: Iterable[Attempt], events: Iterable[dict[str, Any]], last_beat_s: float) -> float:
    """From each attempt's `started` to its last sign. What a killed one did after its last event is left out: the
    interval between saves becomes shorter for it, never longer."""
    began_s: dict[int, float] = {}
    for event in events:
        if event.get("event") == "started" and isinstance(number := event.get("attempt"), int):
            began_s.setdefault(number, epoch_s(event.get("time")) or 0.0)
    ended_s = {attempt.number: attempt.last_sign_s for attempt in attempts if attempt.number in began_s}
    if ended_s:
        newest = max(ended_s)
        ended_s[newest] = max(ended_s[newest], last_beat_s)
    return sum(max(0.0, ended_s[number] - began_s[number]) for number in ended_s if began_s[number])
