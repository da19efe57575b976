"""Training beside a save: steps of fixed work, all ranks together, and what they lose until a save is durable."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

SIDE = 512
BEFORE_S = 0.6
MIN_BEFORE = 8


class Asynchronous(Protocol):
    """A way of saving that lets training go on."""

    def begin(self, folder: Path) -> None:
        """Begin a save; what this takes, training waits."""

    def await_staged(self) -> None:
        """Return when training may change the state."""

    def staged_s(self) -> float | None:
        """The monotonic time at which it became so; None for on return of `begin`."""

    def busy(self) -> bool:
        """Whether this rank has something to do still."""

    def advance(self, busy: bool) -> float | None:
        """The monotonic time at which the save was durable, once it is. Collective; `busy` is any rank's."""


class Training:
    """Matrix products that take about the same time each step, and an all-reduce at its end."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._left, self._right, self._out = (torch.rand(SIDE, SIDE) for _ in range(3))
        self._products = 1

    def calibrate(self, step_s: float) -> float:
        """Make steps take about `step_s` while all ranks compute; the seconds they take."""
        self.step()
        self._products = 8
        one_s = min(self.step()[0] for _ in range(5)) / 8
        self._products = self._group.all_max([max(1, round(step_s / one_s))])[0]
        return statistics.median(self.step()[0] for _ in range(8))

    def step(self, busy: Callable[[], bool] = lambda: False) -> tuple[float, bool]:
        """One step. Returns its seconds, and whether any rank is `busy` at its end."""
        started = time.monotonic()
        for _ in range(self._products):
            torch.mm(self._left, self._right, out=self._out)
        any_busy = bool(self._group.all_max([int(busy())])[0])
        return time.monotonic() - started, any_busy


def save_beside(
    training: Training,
    way: Asynchronous,
    folder: Path,
    group: Any,
    *,
    forward_backward_s: float,
    each_step: Callable[[], None],
) -> dict[str, Any]:
    """One asynchronous save, and the figures of it.

    Args:
        forward_backward_s: undisturbed seconds from one change of the state to the next; rounded up to whole steps.
        each_step: called after each step while the save goes on.
    """
    before = [training.step()[0]]
    while len(before) < MIN_BEFORE or group.all_max([int(sum(before) < BEFORE_S)])[0]:
        before.append(training.step()[0])
    base_s = statistics.median(before)
    boundary = group.all_max([math.ceil(forward_backward_s / base_s)])[0]
    group.barrier()
    began = time.monotonic()
    way.begin(folder)
    call_s = time.monotonic() - began
    during: list[float] = []
    ends: list[float] = []
    waited_s, durable = 0.0, None
    while durable is None:
        seconds, busy = training.step(lambda: len(during) < boundary or way.busy())
        during.append(seconds)
        ends.append(time.monotonic())
        if len(during) == boundary:
            asked = time.monotonic()
            way.await_staged()
            waited_s = time.monotonic() - asked
        each_step()
        durable = way.advance(busy)
    elapsed_s = time.monotonic() - began
    beside = [seconds for seconds, end in zip(during, ends, strict=True) if end - seconds < durable]
    return {
        "call_s": call_s,
        "waited_s": waited_s,
        "blocked_s": call_s + waited_s,
        "safe_s": (way.staged_s() or began + call_s) - began,
        "durable_s": durable - began,
        "step_before_s": base_s,
        "step_during_s": statistics.median(beside or during),
        "lost_s": elapsed_s - len(during) * base_s,
        "steps_before": before,
        "steps_during": beside,
    }
