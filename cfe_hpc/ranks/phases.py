"""Where a rank's time goes: a clock that is in exactly one phase at any time, so that the phases add up to all."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from typing import Literal

__all__ = ["Phase", "PhaseClock", "process_age_s"]

Phase = Literal["startup", "restore", "step", "data", "checkpoint", "evaluation", "shutdown"]


def process_age_s() -> float:
    """Seconds since this process was started, imports and an exec of a program in its place included."""
    with (
        open("/proc/self/stat", encoding="ascii", errors="replace") as stat,
        open("/proc/uptime", encoding="ascii") as up,
    ):
        # The name in brackets may hold spaces and brackets itself; starttime is the 20th field after it.
        started_ticks = int(stat.read().rpartition(")")[2].split()[19])
        return float(up.read().split()[0]) - started_ticks / os.sysconf("SC_CLK_TCK")


class PhaseClock:
    """Seconds of each phase since the process was started, which is in `startup` until told otherwise.

    For one thread alone: the one that trains. A change of phase costs a fraction of a microsecond.
    """

    def __init__(self) -> None:
        self._phase: Phase = "startup"
        self._since_s = time.monotonic() - process_age_s()
        self._spent_s: dict[str, float] = {}

    def enter(self, phase: Phase) -> None:
        """Be in `phase` from now on."""
        now_s = time.monotonic()
        before = self._phase
        self._spent_s[before] = self._spent_s.get(before, 0.0) + now_s - self._since_s
        self._phase, self._since_s = phase, now_s

    def within(self, phase: Phase) -> AbstractContextManager[None]:
        """Be in `phase` while the body runs, and in the present one again after it; they nest."""
        return _Within(self, phase)

    @property
    def phase(self) -> Phase:
        """The present one."""
        return self._phase

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, or since the process was started; phases without any are left
        out. The sums of all calls are the process's age at the last one."""
        self.enter(self._phase)
        taken, self._spent_s = self._spent_s, {}
        return taken


class _Within(AbstractContextManager[None]):
    """`PhaseClock.within`; a class, for a generator's context manager costs several times as much."""

    __slots__ = ("_before", "_clock", "_phase")

    def __init__(self, clock: PhaseClock, phase: Phase) -> None:
        self._clock, self._phase = clock, phase
        self._before: Phase = clock.phase

    def __enter__(self) -> None:
        self._before = self._clock.phase
        self._clock.enter(self._phase)

    def __exit__(self, *error: object) -> None:
        self._clock.enter(self._before)
