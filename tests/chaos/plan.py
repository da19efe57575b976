"""Which faults hurt which run, and when: a pure function of a seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chaos.kinds import KINDS, Kind, kind

__all__ = ["INTERVAL", "STEPS", "Fault", "RunPlan", "plan"]

STEPS = 240
INTERVAL = 6
"""Steps from one save to the next."""

_NODES_A_RUN = 2
"""Of these, at most so many that take a node away: such nodes are avoided, and the cluster has few to spare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a run.

    Attributes:
        after: steps done after a checkpoint that its attempt has committed, when the fault comes.
        rank: of the two ranks, or their nodes, the one to hurt.
    """

    kind: str
    after: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A run and its faults, in order.

    Attributes:
        workload: "training" (the shipped one) or "bulky" (numpy alone; starts in a second).
        beside: checkpoints are written beside training.
        budgets: of [recovery], for the kinds of the run.
        held_by: the budget that its last fault overspends; None: it completes.
    """

    number: int
    workload: Literal["training", "bulky"]
    beside: bool
    faults: tuple[Fault, ...]
    budgets: dict[str, int]
    held_by: str | None

    @property
    def kinds(self) -> list[Kind]:
        return [kind(fault.kind) for fault in self.faults]


def plan(
    seed: int, faults: int, names: Sequence[str] = tuple(each.name for each in KINDS), *, a_run: int = 4
) -> list[RunPlan]:
    """At least so many faults of these kinds, each kind about as often as any other; `a_run` on each run.

    A run that its last fault does not end has a chance of three in ten to overspend a budget with it.
    """
    chosen = random.Random(f"chaos {seed} {faults} {' '.join(names)}")
    runs: list[RunPlan] = []
    left: list[str] = []
    while sum(len(run.faults) for run in runs) < faults:
        mine: list[str] = []
        while len(mine) < a_run:
            if not any(_fits(name, mine) for name in left):
                left += chosen.sample(list(names), len(names))
            mine.append(left.pop(next(index for index, name in enumerate(left) if _fits(name, mine))))
        runs.append(_run(len(runs), mine, chosen))
    return runs


def _fits(name: str, others: Sequence[str]) -> bool:
    nodes = sum(kind(each).node for each in [*others, name])
    # The same error twice holds a run; that is another policy's test.
    return nodes <= _NODES_A_RUN and not (name == "memory" and name in others)


def _run(number: int, names: list[str], chosen: random.Random) -> RunPlan:
    holding = [name for name in names if kind(name).holds]
    held_by: str | None = None
    if holding and chosen.random() < 0.3:
        last = chosen.choice(holding)
        names = [*(name for index, name in enumerate(names) if index != names.index(last)), last]
        held_by = kind(last).budget
    spent = Counter(kind(name).budget for name in names)
    budgets = {key: times - (key == held_by) for key, times in spent.items() if key is not None}
    trains = any(kind(name).trains for name in names) or chosen.random() < 0.3
    return RunPlan(
        number=number,
        workload="training" if trains else "bulky",
        beside=chosen.random() < 0.5 and all(kind(name).prompt for name in names),
        faults=tuple(Fault(kind=name, after=chosen.randint(1, 3), rank=chosen.randint(0, 1)) for name in names),
        budgets=budgets,
        held_by=held_by,
    )
