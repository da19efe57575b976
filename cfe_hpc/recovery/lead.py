"""How long a stop takes, learned from what the run has seen; what follows from it is in recovery.measured."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cfe_hpc.files import read_ndjson
from cfe_hpc.recovery.attempts import Attempt, read_attempts
from cfe_hpc.recovery.measured import Measured
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["Observations", "measure", "observe"]

_TAIL_BYTES = 1 << 18
"""Of heartbeat.ndjson, enough for a thousand lines: how long steps take now, not how long they took last week."""

# Ends that say nothing of how often a run is torn from its nodes: nobody asked, or everybody knew when.
_NO_INTERRUPTION = (None, "completed", "held", "cancelled", "requeue_requested", "time_limit")


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
