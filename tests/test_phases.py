"""The clock of phases: exactly one at a time, so that the phases are the whole."""

from __future__ import annotations

import time

import pytest

from cfe_hpc.ranks import phases
from cfe_hpc.ranks.phases import PhaseClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of one's own in a process that is 5 s old; its only item is the time."""
    times = [100.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: times[0])
    monkeypatch.setattr(phases, "process_age_s", lambda: 5.0)
    return times


def test_phases_nest_and_add_up(now: list[float]) -> None:
    clock = PhaseClock()
    now[0] += 1
    clock.enter("restore")
    now[0] += 2
    clock.enter("step")
    now[0] += 4
    with clock.within("evaluation"):
        now[0] += 8
        with clock.within("checkpoint"):
            now[0] += 16
        now[0] += 32
    assert clock.phase == "step"
    now[0] += 64
    assert clock.take() == {"startup": 6.0, "restore": 2.0, "step": 68.0, "evaluation": 40.0, "checkpoint": 16.0}


def test_taking_starts_anew_in_the_same_phase(now: list[float]) -> None:
    clock = PhaseClock()
    clock.take()
    with clock.within("data"):
        now[0] += 1
        assert clock.take() == {"startup": 0.0, "data": 1.0}
        now[0] += 2
    now[0] += 3
    assert clock.take() == {"data": 2.0, "startup": 3.0}


def test_a_phase_ends_with_an_error_too(now: list[float]) -> None:
    clock = PhaseClock()
    with pytest.raises(ValueError, match="x"), clock.within("data"):
        raise ValueError("x")
    assert clock.phase == "startup"


def test_the_first_phase_began_with_the_process() -> None:
    before_s, began_s = phases.process_age_s(), time.monotonic()
    taken = PhaseClock().take()
    assert before_s <= taken["startup"] + 0.02  # the kernel counts hundredths of seconds
    assert taken["startup"] <= before_s + time.monotonic() - began_s + 0.02
