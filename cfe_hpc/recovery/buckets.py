"""Where the allocated time of a run went: every second of every attempt is in one bucket.

Heartbeats tell what rank 0 did up to the newest of them, phase by phase; events tell of the rest: what came before its
process began, and what became of it after its last line.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any, Literal, get_args

from cfe_hpc.recovery.attempts import Attempt
from cfe_hpc.units import epoch_s

__all__ = ["BUCKETS", "Bucket", "LegBooks", "Part", "fitted", "gather", "spent_s", "split", "told_by"]

Bucket = Literal["queue", "startup", "restore", "steps", "lost", "checkpoint", "evaluation", "data", "shutdown"]
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)

_BLOCK_LINES = 256
_STAMP_CHARS = len("2026-01-01T00:00:00.000Z")
_LOOP = ("steps", "lost", "checkpoint", "evaluation", "data")
_FLUSH_S = 1.0
"""From the event of a stop to the line of the steps before it, at the most."""
_SAVES = ("checkpoint_saved", "checkpoint_failed")


@dataclass(slots=True, kw_only=True)
class LegBooks:
    """What heartbeats and events say of one leg: lines of steps done, and seconds.

    Attributes:
        start: steps done at its beginning.
        last_step: newest step that one of its events names.
        kept: steps done that no later leg did again; set when all legs are known.
        steps, in_steps_s: one entry a line: steps done, and seconds in steps since the line before.
        step_s: one entry a line: seconds of one step.
        spent_s: seconds in other phases, by name.
        complete: every line says where its time went; those of older versions did not.
    """

    start: int
    resumed: bool
    last_step: int = 0
    kept: int = 0
    steps: array[int] = field(default_factory=lambda: array("q"))
    in_steps_s: array[float] = field(default_factory=lambda: array("d"))
    step_s: array[float] = field(default_factory=lambda: array("d"))
    spent_s: dict[str, float] = field(default_factory=dict)
    complete: bool = True

    @property
    def trained(self) -> bool:
        """Whether it came so far as to take up the work."""
        return self.resumed or bool(self.steps) or self.last_step > 0

    @property
    def end(self) -> int:
        """Steps done at its end."""
        return max(self.start, self.last_step, max(self.steps, default=0))

    def counted_s(self) -> float:
        """Seconds of steps that count, by the seconds of one step."""
        return sum(
            seconds * (min(step, self.kept) - before)
            for before, step, seconds in zip([self.start, *self.steps], self.steps, self.step_s, strict=False)
            if before < step and before < self.kept
        )

    def buckets(self) -> dict[str, float]:
        """The seconds that its lines tell of."""
        found = dict(self.spent_s)
        begins = (self.start, *self.steps[:-1])
        if self.kept >= self.end and all(map(operator.lt, begins, self.steps)):
            found["steps"] = found.get("steps", 0.0) + sum(self.in_steps_s)
            return found
        for before, step, seconds in zip([self.start, *self.steps], self.steps, self.in_steps_s, strict=False):
            share = (min(step, self.kept) - before) / (step - before) if before < step else float(step <= self.kept)
            share = max(0.0, share)
            found["steps"] = found.get("steps", 0.0) + seconds * share
            found["lost"] = found.get("lost", 0.0) + seconds * (1 - share)
        return found


@dataclass(slots=True, kw_only=True)
class Part:
    """An attempt, or after a restart inside its allocation the rest of one.

    Attributes:
        began_s, ended_s: epoch seconds; None when nothing tells. It ends where the next part of its attempt begins.
        buckets: seconds; without the queue.
    """

    attempt: Attempt
    legs: list[LegBooks]
    events: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    last_beat_s: float | None = None
    began_s: float | None = None
    ended_s: float | None = None
    buckets: dict[str, float] = field(default_factory=dict)

    @property
    def last_sign_s(self) -> float | None:
        """Of its newest event or heartbeat."""
        return max((*(said_s for said_s, _ in self.events), self.last_beat_s or 0.0), default=0.0) or None

    @property
    def allocated_s(self) -> float:
        """Seconds from its beginning to its end."""
        return 0.0 if self.began_s is None or self.ended_s is None else max(0.0, self.ended_s - self.began_s)


def gather(
    attempts: Sequence[Attempt], events: Iterable[Mapping[str, Any]], heartbeats: Iterable[Mapping[str, Any]]
) -> list[Part]:
    """The parts of a run in order, each with its events and lines, and what of their steps counts."""
    parts = [
        Part(attempt=each, legs=[LegBooks(start=leg.step or 0, resumed=leg.step is not None) for leg in each.legs])
        for each in attempts
    ]
    of: dict[int, list[tuple[Part, int]]] = {}
    for part in parts:
        of.setdefault(part.attempt.number, []).extend((part, index) for index in range(len(part.legs)))
    follows_s = _follows(parts)
    for event in events:
        _take_event(of, follows_s, event)
    beats = iter(heartbeats)
    while block := list(islice(beats, _BLOCK_LINES)):
        if not _take_alike(of, block):
            for beat in block:
                _take_beat(of, beat)
    lowest: int | None = None
    for leg in reversed([leg for part in parts for leg in part.legs if leg.trained]):
        leg.kept = leg.end if lowest is None else max(leg.start, min(leg.end, lowest))
        lowest = leg.start if lowest is None else min(lowest, leg.start)
    return parts


def _follows(parts: Sequence[Part]) -> dict[int, float | None]:
    """When the attempt after each one began; None where nothing tells."""
    firsts: dict[int, Attempt] = {}
    for part in parts:
        firsts.setdefault(part.attempt.number, part.attempt)
    began_s = [attempt.allocated_s or attempt.started_s for attempt in firsts.values()]
    return dict(zip(firsts, [*began_s[1:], None], strict=False))


def _take_event(
    of: Mapping[int, list[tuple[Part, int]]], follows_s: Mapping[int, float | None], event: Mapping[str, Any]
) -> None:
    number, said_s, step = event.get("attempt"), epoch_s(event.get("time")), event.get("step")
    if not isinstance(number, int) or number not in of:
        return
    part, index = _newest(of[number], said_s)
    if isinstance(step, int):
        leg = part.legs[index]
        leg.last_step = max(leg.last_step, step)
    next_s = follows_s[number]
    if said_s is not None and (next_s is None or said_s < next_s):  # a later attempt may tell how this one ended
        part.events.append((said_s, event))


def _take_beat(of: Mapping[int, list[tuple[Part, int]]], beat: Mapping[str, Any]) -> None:
    number, step, said_s = beat.get("attempt"), beat.get("step"), epoch_s(beat.get("time"))
    if not isinstance(number, int) or not isinstance(step, int) or number not in of:
        return
    part, index = _newest(of[number], said_s)
    leg, spent = part.legs[index], beat.get("spent")
    if said_s is not None:
        part.last_beat_s = max(part.last_beat_s or 0.0, said_s)
    leg.steps.append(step)
    leg.step_s.append(_number(beat.get("step_seconds")))
    if not isinstance(spent, dict):
        leg.complete = False
        spent = {}
    in_steps_s, others_s = spent_s(spent)
    leg.in_steps_s.append(in_steps_s)
    for phase, seconds in others_s.items():
        leg.spent_s[phase] = leg.spent_s.get(phase, 0.0) + seconds


def _take_alike(of: Mapping[int, list[tuple[Part, int]]], block: Sequence[Mapping[str, Any]]) -> bool:
    """Take lines that differ in nothing but figures, as nearly all do, column by column: several times as fast.

    Returns:
        False, and nothing is taken, where one of them wants a closer look.
    """
    try:
        (number,) = {beat["attempt"] for beat in block}
        ((part, index),) = of[number]
        stamps = [beat["time"] for beat in block]
        alike = {(len(stamp), stamp[-1:]) for stamp in stamps} == {(_STAMP_CHARS, "Z")}
        steps, step_s = array("q", (beat["step"] for beat in block)), array("d", (b["step_seconds"] for b in block))
        spents = [beat["spent"] for beat in block]
        names = set().union(*spents) & {"step", *BUCKETS}
        seconds = {name: array("d", [spent.get(name, 0.0) for spent in spents]) for name in names}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return False
    # Of stamps that are spelled alike the highest is the latest.
    said_s = epoch_s(max(stamps)) if alike else None
    if said_s is None or not all(min(column) >= 0.0 and sum(column) < inf for column in (step_s, *seconds.values())):
        return False
    leg = part.legs[index]
    part.last_beat_s = max(part.last_beat_s or 0.0, said_s)
    leg.steps.extend(steps)
    leg.step_s.extend(step_s)
    leg.in_steps_s.extend(seconds.pop("step", array("d", bytes(8 * len(block)))))
    for phase, column in seconds.items():
        leg.spent_s[phase] = leg.spent_s.get(phase, 0.0) + sum(column)
    return True


def spent_s(spent: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """What a heartbeat line says of the time since the one before: seconds in steps, and in other buckets."""
    return _number(spent.get("step")), {phase: _number(value) for phase, value in spent.items() if phase in BUCKETS}


def _newest(legs: Sequence[tuple[Part, int]], said_s: float | None) -> tuple[Part, int]:
    """The leg that was under way then: the newest that had begun. A part's first begins with its process."""
    if said_s is not None and len(legs) > 1:
        for part, index in reversed(legs):
            began_s = part.attempt.legs[index].began_s if index else part.attempt.started_s
            if began_s is not None and began_s <= said_s:
                return part, index
    return legs[0]


def _number(value: Any) -> float:
    if type(value) is float and value >= 0.0:  # what nearly all are
        return value
    return max(0.0, float(value)) if isinstance(value, (int, float)) and value == value else 0.0


def split(parts: Sequence[Part], *, completing_s: float | None = None) -> None:
    """Give each part its beginning, its end and its buckets.

    Args:
        completing_s: epoch seconds; the newest attempt is just now completing, which no event tells yet.
    """
    before: Part | None = None
    for index, part in enumerate(parts):
        restarted = before is not None and before.attempt.number == part.attempt.number
        part.began_s = part.attempt.allocated_s or part.attempt.started_s
        if restarted and before is not None:
            part.began_s = before.ended_s
        newest = index == len(parts) - 1
        part.ended_s = _ended_s(part, completing_s if newest else None)
        if part.began_s is not None and part.ended_s is not None:
            part.ended_s = max(part.began_s, part.ended_s)
            _split(part, completing=newest and completing_s is not None, newest=newest)
        before = part


def _ended_s(part: Part, completing_s: float | None) -> float | None:
    """When the scheduler took its nodes back, as far as anybody knows.

    Slurm ends an allocation with the requeue, and counts nothing of what the processes do until they are gone.
    """
    requeued_s = max((said_s for said_s, event in part.events if event.get("event") == "requeued"), default=None)
    supervised = (part.attempt.job_id or "").startswith("local-") and part.attempt.ended_s is not None
    if requeued_s is not None and not supervised and part.attempt.ended_by != "held":
        return max(requeued_s, part.last_beat_s or 0.0)
    ends_s = (part.last_sign_s, part.attempt.ended_s, completing_s)
    return max((end_s for end_s in ends_s if end_s is not None), default=None)


def _split(part: Part, *, completing: bool, newest: bool) -> None:
    assert part.began_s is not None and part.ended_s is not None
    buckets = part.buckets
    process_s = part.attempt.started_s
    if process_s is None:  # it died, or is, on its way to the loop
        _add(buckets, "startup", part.ended_s - part.began_s)
        return
    process_s = min(max(process_s, part.began_s), part.ended_s)
    _add(buckets, "startup", process_s - part.began_s)
    told_s = process_s
    if part.last_beat_s is not None:
        told_s = min(max(part.last_beat_s, process_s), part.ended_s)
        for bucket, seconds in fitted(told_by(part.legs), told_s - process_s).items():
            _add(buckets, bucket, seconds)
    else:
        told_s = _before_any_line(part, process_s)
    for bucket, seconds in _tail(part, told_s, completing=completing, newest=newest):
        _add(buckets, bucket, seconds)


def _add(buckets: dict[str, float], bucket: str, seconds: float) -> None:
    buckets[bucket] = buckets.get(bucket, 0.0) + seconds


def told_by(legs: Iterable[LegBooks]) -> dict[str, float]:
    """The seconds that the lines of a part tell of, by bucket."""
    sums: dict[str, float] = {}
    for leg in legs:
        for bucket, seconds in leg.buckets().items():
            _add(sums, bucket, seconds)
    return sums


def fitted(told: Mapping[str, float], wall_s: float) -> dict[str, float]:
    """What the lines of a part tell, made to fill the time they speak for: the time of lines that are torn, or were
    lost on a full disk with the process, is shared out like that of the loop's others."""
    told_s, loop_s = sum(told.values()), sum(told.get(bucket, 0.0) for bucket in _LOOP)
    if told_s <= wall_s and loop_s > 0:
        factor = (wall_s - told_s + loop_s) / loop_s
        return {name: seconds * factor if name in _LOOP else seconds for name, seconds in told.items()}
    if told_s > 0:
        return {name: seconds * wall_s / told_s for name, seconds in told.items()}
    return {"steps": wall_s}


def _before_any_line(part: Part, process_s: float) -> float:
    """Share out what came before the loop, in a part without a line; epoch seconds of the loop's beginning."""
    began_s = part.ended_s or process_s
    said_s = next((time_s for time_s, event in part.events if event.get("event") == "started"), began_s)
    ends = ("resumed", "signal", "completed", "failed", *_SAVES)
    loop_s = next((time_s for time_s, event in part.events if time_s >= said_s and event.get("event") in ends), began_s)
    said_s = min(max(said_s, process_s), began_s)
    loop_s = min(max(loop_s, said_s), began_s)
    _add(part.buckets, "startup", said_s - process_s)
    _add(part.buckets, "restore", loop_s - said_s)
    return loop_s


def _tail(part: Part, told_s: float, *, completing: bool, newest: bool) -> Iterable[tuple[Bucket, float]]:
    """Where the time after the last line went."""
    attempt, ended_s = part.attempt, part.ended_s or told_s
    said = {event.get("event") for time_s, event in part.events if time_s >= told_s - _FLUSH_S}
    saves_s = [time_s for time_s, event in part.events if event.get("event") in _SAVES and time_s >= told_s]
    failed_s = [time_s for time_s, event in part.events if event.get("event") == "failed" and time_s >= told_s]
    if completing or "completed" in said or ("signal" in said and not failed_s):
        last_s = min(max(saves_s, default=told_s), ended_s)
        yield "checkpoint", last_s - told_s
        yield "shutdown", ended_s - last_s
    elif newest and attempt.ended_by is None and attempt.ended_s is None:
        yield "steps", ended_s - told_s
    else:
        end_s = min(min(failed_s, default=ended_s), ended_s)
        yield "lost", end_s - told_s
        yield "shutdown", ended_s - end_s
