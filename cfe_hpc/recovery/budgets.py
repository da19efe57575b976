"""Whether another attempt follows: a budget for each kind of end, and a guard against going round in circles."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cfe_hpc.config.job import Recovery
from cfe_hpc.recovery.attempts import Attempt, read_attempts
from cfe_hpc.recovery.causes import Cause

__all__ = ["FRUITLESS_LIMIT", "Decision", "decide"]

# Two preemptions in a row may both hit the minutes of start-up on a busy spot partition; three are a pattern.
FRUITLESS_LIMIT = 3

_WORDS: dict[Cause, str] = {
    "preempted": "preemption",
    "time_limit": "time limit",
    "requeue_requested": "requeue asked for",
    "node_failure": "node failure",
    "cancelled": "cancel",
    "failed": "failure",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows an attempt, and a sentence that says why."""

    action: Literal["requeue", "hold", "fail"]
    why: str


def decide(recovery: Recovery, events: Iterable[dict[str, Any]], *, cause: Cause) -> Decision:
    """What follows the attempt that is ending now.

    Only events after the last `held` count: who takes a run out of its hold gives it fresh budgets.

    Args:
        events: all events of the run; those of the ending attempt may or may not say already how it ends.
        cause: how it ends. `cancelled` never leads to another attempt; `requeue_requested` always does.
    """
    if cause == "cancelled":
        return Decision(action="fail", why="cancelled by its user")
    if cause == "requeue_requested":
        return Decision(action="requeue", why="requeue asked for")
    current, earlier = _split(read_attempts(_since_last_hold(events)))
    count = 1 + sum(attempt.ended_by == cause for attempt in earlier)
    budget = _budget(recovery, cause)
    if budget is not None and count > budget:
        spent = f"{_WORDS[cause]} number {count}; the job allows {budget} ({_KEYS[cause]})"
        if cause == "failed":
            return Decision(action="fail", why=f"{spent}: {current.error or 'no error was reported'}")
        return Decision(action="hold", why=spent)
    if cause == "failed" and current.error and not current.killed and _seen_before(current.error, earlier):
        return Decision(action="hold", why=f"the same first error twice: {current.error}")
    if _fruitless([*earlier, current]) >= FRUITLESS_LIMIT:
        return Decision(
            action="hold",
            why=f"{FRUITLESS_LIMIT} attempts in a row ended without a step gained, at step "
            f"{current.resumed_from or 0} (the last one by {_WORDS[cause]})",
        )
    allowed = "without limit while steps advance" if budget is None else f"of {budget} allowed"
    return Decision(action="requeue", why=f"{_WORDS[cause]} number {count}, {allowed}")


_KEYS: dict[Cause, str] = {
    "preempted": "recovery.preemptions",
    "time_limit": "recovery.timeouts",
    "node_failure": "recovery.node_failures",
    "failed": "recovery.failures",
}


def _budget(recovery: Recovery, cause: Cause) -> int | None:
    field: str = _KEYS[cause].rpartition(".")[2]
    budget: int | None = getattr(recovery, field)
    return budget


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


def _fruitless(attempts: list[Attempt]) -> int:
    """Attempts in a row, the last one first, that gained no step. Those their user sent back do not count."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.ended_by == "requeue_requested":
            continue
        if attempt.gained or not attempt.counts_steps:
            break
        count += 1
    return count


def _seen_before(error: str, attempts: list[Attempt]) -> bool:
    failed = (attempt.error for attempt in attempts if attempt.ended_by == "failed" and attempt.error)
    return any(_signature(earlier) == _signature(error) for earlier in failed)


def _signature(error: str) -> str:
    """An error without what differs from one process to the next: addresses in memory."""
    return re.sub(r"0x[0-9a-fA-F]+", "0x…", error).strip()
