"""The books of runs that have not ended, kept up to date by what was appended since an earlier look.

The books of a run need all its heartbeats, which are many in a long one. While an attempt simply goes on, new lines
only add to the sums; whatever else happens, a stop, a roll-back, a new attempt, has all be read again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cfe_hpc.files import ndjson_record
from cfe_hpc.recovery.buckets import BUCKETS, Part, fitted, spent_s, told_by
from cfe_hpc.recovery.ledger import Summary, parts_of, summed
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["Ongoing", "follow_up"]

_HARMLESS = ("checkpoint_saved", "checkpoint_failed", "degraded")
"""Events that change nothing in the books of an attempt that goes on."""

_WORTH_BYTES = 16 * 1024
"""Heartbeats below this are read as fast as what was kept of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Of the newest attempt, while nothing but steps comes.

    Attributes:
        attempt: its number.
        beat_step: steps done by its last line.
        began_s, process_s, last_beat_s: epoch seconds of its allocation, its rank 0's process and its last line.
        told_s: seconds that its lines tell of, by bucket.
        others_s: seconds by bucket of all that came before its process.
        allocated_s: of the parts before it.
        first_s: epoch seconds of the run's submission, or first start.
    """

    attempt: int
    beat_step: int
    began_s: float
    process_s: float
    last_beat_s: float
    told_s: dict[str, float]
    others_s: dict[str, float]
    allocated_s: float
    first_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ongoing:
    """A run's books, and how far its files had been read for them.

    Attributes:
        events_bytes, beats_bytes: sizes of the files, at least so much of which was read.
        control_ns: when control/ last changed.
        growth: None where the books cannot be carried on.
    """

    summary: Summary
    events_bytes: int
    beats_bytes: int
    control_ns: int
    growth: Growth | None

    @property
    def worth_keeping(self) -> bool:
        """Whether reading it all again would take longer than this does to store."""
        return self.beats_bytes >= _WORTH_BYTES

    def stored(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def restored(cls, stored: dict[str, Any] | None) -> Ongoing | None:
        """What `stored` gave; None when it does not fit."""
        try:
            facts = dict(stored or {})
            growth = facts.pop("growth")
            summary = Summary(**facts.pop("summary"))
            return cls(summary=summary, growth=None if growth is None else Growth(**growth), **facts)
        except (KeyError, TypeError):
            return None


def follow_up(folder: RunFolder, before: Ongoing | None) -> Ongoing:
    """The run's books now: those of `before`, carried on where they can be."""
    sizes = _size(folder.events_path), _size(folder.heartbeat_path), _changed_ns(folder.control)
    if before is not None and sizes == (before.events_bytes, before.beats_bytes, before.control_ns):
        return before
    carried = None if before is None or sizes[2] != before.control_ns else _carried_on(folder, before, sizes)
    return carried or _read_whole(folder, sizes)


def _read_whole(folder: RunFolder, sizes: tuple[int, int, int]) -> Ongoing:
    parts = parts_of(folder)
    summary = summed(folder, parts)
    growth = _growth(parts, summary) if parts and summary.buckets else None
    return Ongoing(summary=summary, events_bytes=sizes[0], beats_bytes=sizes[1], control_ns=sizes[2], growth=growth)


def _growth(parts: Sequence[Part], summary: Summary) -> Growth | None:
    *before, newest = parts
    attempt, last_beat_s = newest.attempt, newest.last_beat_s
    goes_on = attempt.ended_by is None and attempt.ended_s is None and attempt.cause is None
    began_s, ended_s = newest.began_s, newest.ended_s
    if not goes_on or last_beat_s is None or began_s is None or ended_s is None or attempt.started_s is None:
        return None
    if any(event.get("event") in ("signal", "completed") for _, event in newest.events):
        return None
    process_s = min(max(attempt.started_s, began_s), ended_s)
    others_s = {"startup": process_s - began_s}
    for part in before:
        for bucket, seconds in part.buckets.items():
            others_s[bucket] = others_s.get(bucket, 0.0) + seconds
    return Growth(
        attempt=attempt.number,
        beat_step=max(newest.legs[-1].steps, default=newest.legs[-1].start),
        began_s=began_s,
        process_s=process_s,
        last_beat_s=last_beat_s,
        told_s=told_by(newest.legs),
        others_s=others_s,
        allocated_s=sum(part.allocated_s for part in before),
        first_s=(summary.last_sign_s or ended_s) - summary.wall_seconds,
    )


def _carried_on(folder: RunFolder, before: Ongoing, sizes: tuple[int, int, int]) -> Ongoing | None:
    """The books with what was appended; None where it is more than steps."""
    growth = before.growth
    if growth is None or sizes[0] < before.events_bytes or sizes[1] < before.beats_bytes:
        return None
    sign_s, step = before.summary.last_sign_s or growth.last_beat_s, before.summary.last_step
    for event in _appended(folder.events_path, before.events_bytes):
        if event.get("event") not in _HARMLESS or event.get("attempt") != growth.attempt:
            return None
        sign_s = max(sign_s, epoch_s(event.get("time")) or 0.0)
        step = max(step, event["step"]) if isinstance(event.get("step"), int) else step
    told_s, beat_step, beat_s = dict(growth.told_s), growth.beat_step, growth.last_beat_s
    for beat in _appended(folder.heartbeat_path, before.beats_bytes):
        spent, steps_done, said_s = beat.get("spent"), beat.get("step"), epoch_s(beat.get("time"))
        if beat.get("attempt") != growth.attempt or not isinstance(spent, dict) or said_s is None:
            return None
        if not isinstance(steps_done, int) or steps_done <= beat_step:
            continue  # read before: the file had grown meanwhile
        in_steps_s, others_s = spent_s(spent)
        for bucket, seconds in {**others_s, "steps": in_steps_s + others_s.get("steps", 0.0)}.items():
            told_s[bucket] = told_s.get(bucket, 0.0) + seconds
        beat_step, beat_s = steps_done, max(beat_s, said_s)
    grown = replace(growth, beat_step=beat_step, told_s=told_s, last_beat_s=beat_s)
    summary = _summary(before.summary, grown, step=max(step, beat_step), last_sign_s=max(sign_s, beat_s))
    return Ongoing(summary=summary, events_bytes=sizes[0], beats_bytes=sizes[1], control_ns=sizes[2], growth=grown)


def _summary(before: Summary, growth: Growth, *, step: int, last_sign_s: float) -> Summary:
    """As recovery.ledger makes it of the same events and lines."""
    buckets = dict(growth.others_s)
    for bucket, seconds in fitted(growth.told_s, growth.last_beat_s - growth.process_s).items():
        buckets[bucket] = buckets.get(bucket, 0.0) + seconds
    buckets["steps"] = buckets.get("steps", 0.0) + last_sign_s - growth.last_beat_s
    allocated_s = growth.allocated_s + last_sign_s - growth.began_s
    wall_s = last_sign_s - growth.first_s
    buckets["queue"] = max(0.0, wall_s - allocated_s)
    useful = round(buckets["steps"], 3)
    return replace(
        before,
        last_step=step,
        goodput=round(min(1.0, useful / allocated_s), 4) if allocated_s > 0 else None,
        allocated_seconds=round(allocated_s, 3),
        wall_seconds=round(wall_s, 3),
        last_sign_s=last_sign_s,
        buckets={bucket: round(buckets.get(bucket, 0.0), 3) for bucket in BUCKETS},
    )


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _changed_ns(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _appended(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """The whole lines from byte `start` on."""
    try:
        with open(path, "rb") as stream:
            stream.seek(start)
            for line in stream:
                record = ndjson_record(line) if line.endswith(b"\n") else None
                if record is not None:
                    yield record
    except FileNotFoundError:
        return
