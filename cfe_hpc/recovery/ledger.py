"""The books of a run: steps done and lost, and how much of the allocated time went into steps that count."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cfe_hpc.recovery.attempts import Attempt, epoch_s, read_attempts
from cfe_hpc.runfolder import RunFolder

__all__ = ["Summary", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run so far.

    Attributes:
        attempts: attempts begun; 0 before the first.
        last_step: steps done, those of the newest attempt that trained.
        lost_steps: steps done by an attempt, beyond what the next one that trained took up from.
        goodput: step seconds that count ÷ allocated_seconds; None when no step was timed.
        allocated_seconds: over all attempts, from `started` to the last sign of life (an event or a heartbeat).
        wall_seconds: from submission (or the first start) to the last sign of life, waiting in the queue included.
        total_steps: of the whole run, as the newest attempt announced it; None when none did.
        job_id: the scheduler's, of the newest attempt that names one.
        last_sign_s: epoch seconds of the newest event or heartbeat of an attempt; None before the first.
    """

    attempts: int
    last_step: int
    lost_steps: int
    goodput: float | None
    allocated_seconds: float
    wall_seconds: float
    total_steps: int | None
    job_id: str | None
    last_sign_s: float | None


@dataclass(slots=True)
class _Beats:
    """One attempt's heartbeats: steps done, and seconds of one step as of each line."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    last_time: Any = None

    def counted_seconds(self, start: int, end: int) -> float:
        """Seconds of the steps after `start`, up to `end`. A line speaks for all steps since the line before it."""
        total, before = 0.0, start
        for step, seconds in zip(self.steps, self.seconds, strict=True):
            if before < step <= end:
                total += seconds * (step - before)
                before = step
        return total


def summarise(folder: RunFolder) -> Summary:
    """Add up a run's events and heartbeats; reads both files once, whole.

    Returns:
        The books so far. A run that is training has lost nothing yet in its present attempt.
    """
    events = list(folder.events())
    attempts = read_attempts(events)
    beats = _gather(folder.heartbeats())
    trained = [(a.number, span) for a in attempts if (span := _span(a, beats.get(a.number))) is not None]
    lost, useful_s = 0, 0.0
    for index, (number, (start, end)) in enumerate(trained):
        kept = min(end, trained[index + 1][1][0]) if index + 1 < len(trained) else end
        lost += end - kept
        useful_s += beats[number].counted_seconds(start, kept) if number in beats else 0.0
    allocated_s = sum(_allocated_s(attempt, beats.get(attempt.number)) for attempt in attempts)
    last_sign_s = max((_last_sign_s(a, beats.get(a.number)) for a in attempts), default=None)
    return Summary(
        attempts=len(attempts),
        last_step=trained[-1][1][1] if trained else 0,
        lost_steps=lost,
        goodput=round(min(1.0, useful_s / allocated_s), 4) if beats and allocated_s > 0 else None,
        allocated_seconds=round(allocated_s, 3),
        wall_seconds=round(_wall_s(events, attempts, last_sign_s), 3),
        total_steps=next((a.total_steps for a in reversed(attempts) if a.total_steps is not None), None),
        job_id=next((a.job_id for a in reversed(attempts) if a.job_id), None),
        last_sign_s=last_sign_s,
    )


def _gather(heartbeats: Iterable[Mapping[str, Any]]) -> dict[int, _Beats]:
    beats: dict[int, _Beats] = {}
    for beat in heartbeats:
        attempt, step = beat.get("attempt"), beat.get("step")
        if not isinstance(attempt, int) or not isinstance(step, int):
            continue
        mine = beats.setdefault(attempt, _Beats())
        seconds = beat.get("step_seconds")
        mine.steps.append(step)
        mine.seconds.append(seconds if isinstance(seconds, (int, float)) else 0.0)
        mine.last_time = beat.get("time")
    return beats


def _span(attempt: Attempt, beats: _Beats | None) -> tuple[int, int] | None:
    """(steps done when the attempt took up the work, steps done at its end); None when it never came so far."""
    if attempt.resumed_from is None and not beats and not attempt.last_step:
        return None
    start = attempt.resumed_from or 0
    return start, max(start, attempt.last_step or 0, max(beats.steps, default=0) if beats else 0)


def _last_sign_s(attempt: Attempt, beats: _Beats | None) -> float:
    beat_s = epoch_s(beats.last_time) if beats else None
    return max(attempt.last_sign_s, beat_s or 0.0)


def _allocated_s(attempt: Attempt, beats: _Beats | None) -> float:
    if attempt.started_s is None:
        return 0.0
    return max(0.0, _last_sign_s(attempt, beats) - attempt.started_s)


def _wall_s(events: Iterable[Mapping[str, Any]], attempts: list[Attempt], last_sign_s: float | None) -> float:
    submitted = (epoch_s(event.get("time")) for event in events if event.get("event") == "submitted")
    started = (attempt.started_s for attempt in attempts if attempt.started_s is not None)
    first_s = next(submitted, None) or next(started, None)
    return 0.0 if first_s is None or last_sign_s is None else max(0.0, last_sign_s - first_s)
