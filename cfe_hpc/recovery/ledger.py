"""The books of a run: steps done and lost, and how much of the allocated time went into steps that count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cfe_hpc.recovery.attempts import attempts_of
from cfe_hpc.recovery.buckets import BUCKETS, LegBooks, Part, gather, split
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["Summary", "parts_of", "summarise", "summed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run so far.

    Attributes:
        attempts: attempts begun; 0 before the first.
        last_step: steps done, those of the newest attempt that trained.
        lost_steps: steps done by an attempt, beyond what the next one that trained took up from.
        goodput: seconds of steps that count ÷ allocated_seconds; None when no step was timed.
        allocated_seconds: over all attempts, from the batch script's first line (or the start of rank 0's process) to
            its last (or the last sign of life: an event or a heartbeat).
        wall_seconds: from submission (or the first start) to the end of the last attempt, the queue included.
        total_steps: of the whole run, as the newest attempt announced it; None when none did.
        job_id: the scheduler's, of the newest attempt that names one.
        last_sign_s: epoch seconds of the newest event or heartbeat of an attempt; None before the first.
        buckets: seconds by recovery.buckets.Bucket; those without the queue add up to allocated_seconds. Empty when
            heartbeats do not tell where time went: those of older versions, and of plain commands.
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
    buckets: dict[str, float] = field(default_factory=dict)


def parts_of(folder: RunFolder, *, completing_s: float | None = None) -> list[Part]:
    """The parts of a run's attempts, each with its books. Reads heartbeats once, whole.

    Args:
        completing_s: epoch seconds, said by who writes that the run has completed: no event tells it yet.
    """
    parts = gather(attempts_of(folder), folder.events(), folder.heartbeats())
    split(parts, completing_s=completing_s)
    return parts


def summarise(folder: RunFolder, *, completing_s: float | None = None) -> Summary:
    """Add up a run's events and heartbeats.

    Args:
        completing_s: as for `parts_of`.

    Returns:
        The books so far. A run that is training has lost nothing yet in its present attempt.
    """
    return summed(folder, parts_of(folder, completing_s=completing_s))


def summed(folder: RunFolder, parts: Sequence[Part]) -> Summary:
    """The books of a run whose parts are known."""
    legs = [leg for part in parts for leg in part.legs if leg.trained]
    allocated_s = sum(part.allocated_s for part in parts)
    last_sign_s = max((sign_s for part in parts if (sign_s := part.last_sign_s) is not None), default=None)
    first_s, last_s = _first_s(folder.events(), parts), _last_s(parts, last_sign_s)
    wall_s = 0.0 if first_s is None or last_s is None else max(0.0, last_s - first_s)
    buckets = _buckets(parts, legs, queue_s=max(0.0, wall_s - allocated_s))
    useful_s = buckets["steps"] if buckets else sum(leg.counted_s() for leg in legs)
    timed = any(leg.steps for leg in legs) and allocated_s > 0
    return Summary(
        attempts=len({part.attempt.number for part in parts}),
        last_step=legs[-1].end if legs else 0,
        lost_steps=sum(leg.end - leg.kept for leg in legs),
        goodput=round(min(1.0, useful_s / allocated_s), 4) if timed else None,
        allocated_seconds=round(allocated_s, 3),
        wall_seconds=round(wall_s, 3),
        total_steps=next((p.attempt.total_steps for p in reversed(parts) if p.attempt.total_steps is not None), None),
        job_id=next((part.attempt.job_id for part in reversed(parts) if part.attempt.job_id), None),
        last_sign_s=last_sign_s,
        buckets=buckets,
    )


def _buckets(parts: Sequence[Part], legs: Iterable[LegBooks], *, queue_s: float) -> dict[str, float]:
    """The sums over all parts; empty where they would be guesses."""
    if not all(leg.complete for leg in legs) or not any(part.attempt.counts_steps for part in parts):
        return {}
    sums = {"queue": queue_s}
    for part in parts:
        for bucket, seconds in part.buckets.items():
            sums[bucket] = sums.get(bucket, 0.0) + seconds
    return {bucket: round(sums.get(bucket, 0.0), 3) for bucket in BUCKETS}


def _first_s(events: Iterable[Mapping[str, Any]], parts: Sequence[Part]) -> float | None:
    """When the run was submitted, or else when its first attempt began."""
    submitted = (epoch_s(event.get("time")) for event in events if event.get("event") == "submitted")
    began = (part.began_s for part in parts if part.began_s is not None)
    return next(submitted, None) or next(began, None)


def _last_s(parts: Sequence[Part], last_sign_s: float | None) -> float | None:
    """When the last attempt ended, or gave its last sign."""
    ends_s = [last_sign_s, *(part.ended_s for part in parts)]
    return max((end_s for end_s in ends_s if end_s is not None), default=None)
