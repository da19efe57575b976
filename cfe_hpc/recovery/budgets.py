"""Whether another attempt follows, and what it does otherwise: a budget for each kind of end, a guard against going
round in circles, each a small policy of its own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal

from cfe_hpc.config.job import Recovery
from cfe_hpc.recovery.attempts import Attempt, read_attempts
from cfe_hpc.recovery.causes import CAUSES, Cause, Row, row
from cfe_hpc.recovery.effects import Effect

__all__ = ["EFFECTS", "FRUITLESS_LIMIT", "INTERRUPTED_LIMIT", "POLICIES", "Case", "Decision", "Effect", "decide"]

FRUITLESS_LIMIT = 2
"""Attempts in a row without a step gained, after which the run is held."""

# Two preemptions in a row may both hit the minutes of start-up on a busy spot partition; three are a pattern.
INTERRUPTED_LIMIT = 3
"""The same, where some were interrupted before their first step."""

_INTERRUPTIONS = frozenset({"preempted", "time_limit", "node_failure", "node_unfit"})

# The next attempt does something else than this one did, and the budgets of these have an end.
_HEALED = frozenset({"nan", "oom_device"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows an attempt, a sentence that says why, and what the next one does otherwise."""

    action: Literal["requeue", "hold", "fail"]
    why: str
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a policy looks at.

    Attributes:
        row: of the cause that ends the current attempt.
        current: the attempt that is ending, or that is about to undo some of its steps.
        earlier: those before it, since the run was last taken out of a hold.
    """

    recovery: Recovery
    row: Row
    current: Attempt
    earlier: Sequence[Attempt]

    @property
    def budget(self) -> int | None:
        """How often the cause is followed by another attempt; None without limit."""
        found: int | None = getattr(self.recovery, self.row.budget) if self.row.budget else None
        return found

    @property
    def count(self) -> int:
        """How much of its budget the cause has used, this time included. Causes may share one."""
        if self.row.cause == "nan":
            return self._roll_backs()
        shared = {each.cause for each in CAUSES if each.budget is not None and each.budget == self.row.budget}
        return 1 + sum(attempt.ended_by in shared for attempt in self.earlier)

    def _roll_backs(self) -> int:
        """Undone steps count, whether or not their attempt went on; a value that ends an attempt counts once."""
        undone = sum(attempt.undone for attempt in [*self.earlier, self.current])
        ended = sum(attempt.ended_by == "nan" and not attempt.undone for attempt in self.earlier)
        counted_already = self.current.cause == "nan" and self.current.undone > 0
        return undone + ended + int(not counted_already)


Policy = Callable[[Case], Decision | None]


def user_said(case: Case) -> Decision | None:
    """A user's word is final, either way."""
    if case.row.cause == "cancelled":
        return Decision(action="fail", why="cancelled by its user")
    return Decision(action="requeue", why=case.row.word) if case.row.retried == "always" else None


def never_retried(case: Case) -> Decision | None:
    """Nothing changes by trying again what the next attempt would find as it is."""
    if case.row.retried != "never":
        return None
    return Decision(action=case.row.spent, why=f"{case.row.word}, which no other attempt mends{_error(case)}")


def budget_spent(case: Case) -> Decision | None:
    """Each cause is followed by another attempt so often."""
    if case.budget is None or case.count <= case.budget:
        return None
    spent = f"{case.row.word} number {case.count}; the job allows {case.budget} (recovery.{case.row.budget})"
    return Decision(action=case.row.spent, why=f"{spent}{_error(case)}")


def same_error(case: Case) -> Decision | None:
    """An error that comes again as it was will come a third time."""
    error = case.current.error
    if not case.row.same_error_holds or not error or case.current.killed or not _seen_before(error, case.earlier):
        return None
    return Decision(action="hold", why=f"the same first error twice: {error}")


def no_progress(case: Case) -> Decision | None:
    """Attempts that gain nothing only burn the queue, whatever ends them."""
    if case.row.cause in _HEALED:
        return None
    fruitless = _fruitless([*case.earlier, replace(case.current, ended_by=case.row.cause)])
    own = sum(not _interrupted(attempt) for attempt in fruitless)
    if own < FRUITLESS_LIMIT and len(fruitless) < INTERRUPTED_LIMIT:
        return None
    return Decision(
        action="hold",
        why=f"{len(fruitless)} attempts in a row ended without a step gained, at step "
        f"{case.current.resumed_from or 0} (the last one by {case.row.word}){_error(case)}",
    )


POLICIES: tuple[Policy, ...] = (user_said, never_retried, budget_spent, same_error, no_progress)
"""The first that speaks decides; when none does, another attempt follows."""


def _halve(case: Case) -> Sequence[Effect]:
    return [Effect(reason="micro_batch_halved", detail={"divisor": 2})]


def _exclude(case: Case) -> Sequence[Effect]:
    """The nodes that an error of this attempt names are avoided for a while, by other runs too."""
    seconds = case.recovery.exclude_nodes_for
    if not seconds:
        return []
    until = datetime.fromtimestamp(time.time() + seconds, timezone.utc).isoformat(timespec="seconds")
    about = {"until": until.replace("+00:00", "Z"), "cause": case.row.cause, "why": case.current.error or case.row.word}
    return [Effect(reason="node_excluded", detail={"node": node, **about}) for node in case.current.bad_hosts]


EFFECTS: Mapping[Cause, Callable[[Case], Sequence[Effect]]] = {
    "oom_device": _halve,
    "node_failure": _exclude,
    "node_unfit": _exclude,
}


def decide(recovery: Recovery, events: Iterable[dict[str, Any]], *, cause: Cause) -> Decision:
    """What follows the attempt that is ending now.

    Only events after the last `held` count: who takes a run out of its hold gives it fresh budgets. Effects are for
    the caller to carry out, whatever the action: a node that failed is avoided when the run is held, too.

    Args:
        events: all events of the run; those of the ending attempt may or may not say already how it ends.
        cause: how it ends. `cancelled` never leads to another attempt; `requeue_requested` always does. "nan" is
            also asked for before steps are undone, inside the attempt.
    """
    current, earlier = _split(read_attempts(_since_last_hold(events)))
    case = Case(recovery=recovery, row=row(cause), current=current, earlier=earlier)
    spoken = next((decision for policy in POLICIES if (decision := policy(case)) is not None), None)
    decision = spoken or Decision(action="requeue", why=_allowed(case))
    effects = EFFECTS.get(cause)
    if effects is None or (decision.action != "requeue" and cause == "oom_device"):
        return decision
    return replace(decision, effects=tuple(effects(case)))


def _allowed(case: Case) -> str:
    budget = case.budget
    allowed = "without limit while steps advance" if budget is None else f"of {budget} allowed"
    return f"{case.row.word} number {case.count}, {allowed}"


def _error(case: Case) -> str:
    """What to add to a sentence about an error; nothing when it is the scheduler that ended the attempt."""
    if case.row.cause in ("preempted", "time_limit"):
        return ""
    if case.current.error:
        return f": {case.current.error}"
    return ": no error was reported" if case.row.cause == "failed" else ""


def _since_last_hold(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == "held":
            kept.clear()
        else:
            kept.append(event)
    return kept


def _split(attempts: list[Attempt]) -> tuple[Attempt, list[Attempt]]:
    """(the attempt that is ending, those before it). One that died before its first event is not among them."""
    if not attempts or attempts[-1].requeued:
        return Attempt(number=attempts[-1].number + 1 if attempts else 0), attempts
    return attempts[-1], attempts[:-1]


def _fruitless(attempts: list[Attempt]) -> list[Attempt]:
    """Attempts in a row, the last one first, that gained no step. Passed over are those that their user sent back,
    and those after which something was changed."""
    found: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.ended_by == "requeue_requested" or attempt.ended_by in _HEALED:
            continue
        if attempt.gained or not attempt.counts_steps:
            break
        found.append(attempt)
    return found


def _interrupted(attempt: Attempt) -> bool:
    """Whether it was ended from outside before it could do a step."""
    before_a_step = (attempt.last_step or 0) <= (attempt.resumed_from or 0)
    return attempt.ended_by in _INTERRUPTIONS and before_a_step


def _seen_before(error: str, attempts: Sequence[Attempt]) -> bool:
    alike = {each.cause for each in CAUSES if each.same_error_holds}
    failed = (attempt.error for attempt in attempts if attempt.ended_by in alike and attempt.error)
    return any(_signature(earlier) == _signature(error) for earlier in failed)


def _signature(error: str) -> str:
    """An error without what differs from one process to the next: addresses in memory."""
    return re.sub(r"0x[0-9a-fA-F]+", "0x…", error).strip()
