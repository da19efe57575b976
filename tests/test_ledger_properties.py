"""The books of whatever may stand in the files of a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_events import ZERO, Events, line, stamp, started

from cfe_hpc.recovery.attempts import read_attempts
from cfe_hpc.recovery.buckets import gather, split

NAMES = ("started", "resumed", "checkpoint_saved", "signal", "rolled_back", "failed", "requeued", "completed", "held")
MINUTES = st.integers(0, 50).map(lambda at: 60.0 * at)
TIMES = st.none() | MINUTES.map(stamp)
STEPS = st.integers(0, 9)
SECONDS = st.sampled_from([None, "nan", -5.0, 0.0, 3.5, 60.0, 600.0])
DETAILS = st.fixed_dictionaries(
    {"total_steps": st.just(30)},
    optional={
        "startup_seconds": SECONDS,
        "allocated_s": MINUTES.map(lambda at: ZERO + at),
        "restart": st.integers(0, 2),
    },
)
EVENTS = st.fixed_dictionaries(
    {"event": st.sampled_from(NAMES), "attempt": st.integers(0, 2), "time": TIMES},
    optional={"step": STEPS, "detail": DETAILS, "reason": st.sampled_from(["preempted", "failed", "nan"])},
)
SPENT = st.dictionaries(st.sampled_from(["startup", "restore", "step", "data", "queue", "x"]), SECONDS, max_size=3)
BEATS = st.fixed_dictionaries({"attempt": st.integers(0, 2), "step": STEPS, "time": TIMES, "spent": SPENT})


@given(
    st.lists(EVENTS, max_size=8),
    st.lists(BEATS, max_size=6),
    st.dictionaries(st.integers(0, 2), MINUTES, max_size=2),
    st.none() | MINUTES,
)
def test_the_buckets_of_a_part_add_up_whatever_was_written(
    events: Events, beats: Events, ends: dict[int, float], completing: float | None
) -> None:
    attempts = read_attempts(events)
    for each in attempts:
        each.ended_s = ZERO + ends[each.number] if each.number in ends else None
    parts = gather(attempts, events, beats)
    split(parts, completing_s=None if completing is None else ZERO + completing)
    for part in parts:
        assert sum(part.buckets.values()) == pytest.approx(part.allocated_s, abs=1e-3)
        assert all(seconds >= -1e-6 for seconds in part.buckets.values()), part.buckets
        assert all(leg.start <= leg.kept <= leg.end for leg in part.legs if leg.trained)


ODD = st.sampled_from([-1.0, float("nan"), float("inf"), "1", None, True, 2])
ROWS = st.fixed_dictionaries(
    {"attempt": st.integers(0, 1), "step": STEPS, "time": TIMES},
    optional={
        "step_seconds": SECONDS | ODD,
        "spent": st.dictionaries(st.sampled_from(["restore", "step", "data", "x"]), SECONDS, max_size=3) | ODD,
    },
)
WHOLE = st.fixed_dictionaries(
    {"attempt": st.just(0), "step": STEPS, "time": TIMES, "step_seconds": SECONDS, "spent": SPENT}
)


@given(st.lists(EVENTS, max_size=4), st.lists(WHOLE | ROWS, max_size=8) | st.lists(WHOLE, max_size=8))
def test_lines_are_taken_alike_one_by_one_and_together(events: Events, beats: Events) -> None:
    attempts = read_attempts([started(0, 0, allocated=0), *events])
    together = gather(attempts, events, beats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfe_hpc.recovery.buckets._take_alike", lambda of, block: False)
        one_by_one = gather(attempts, events, beats)
    for each in (together, one_by_one):
        split(each)
    assert repr(together) == repr(one_by_one)


def test_lines_that_are_alike_are_taken_together() -> None:
    attempts = read_attempts([started(0, 0, allocated=0)])
    beats = [line(0, done, done + 1.0, step=0.75, data=0.25) for done in range(1, 1000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("cfe_hpc.recovery.buckets._take_beat")
        (part,) = gather(attempts, [], beats)
    (leg,) = part.legs
    assert leg.buckets() == {"data": 249.75, "steps": 749.25}
    assert (leg.end, part.last_beat_s) == (999, ZERO + 1000)
