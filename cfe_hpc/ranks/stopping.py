"""The end of an attempt that was told to stop: reason, verdict, and the requeue, last and once."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.config.job import Recovery
from cfe_hpc.errors import CfeError
from cfe_hpc.ranks.scheduler import Cause, Scheduler
from cfe_hpc.recovery.budgets import decide
from cfe_hpc.runfolder import RunFolder

__all__ = ["Inquiry", "Verdict", "conclude"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of the run after this attempt, the same on every rank.

    Attributes:
        action: "requeued": another attempt follows. "cancelled": none ever. "held": none until `requeue RUN`.
            "killed": somebody else ends this attempt; stay alive until then, for a clean exit would lose the run.
        exit_code: for the ranks to exit with.
    """

    action: Literal["requeued", "cancelled", "held", "killed"]
    cause: Cause
    why: str
    exit_code: int


class Inquiry:
    """Asks the scheduler why, beside the save: the answer takes as long as slurmctld likes."""

    def __init__(self, scheduler: Scheduler, signals: list[str]) -> None:
        self._answer: tuple[Cause, str] = ("unknown", "the scheduler was not asked")
        self._thread = threading.Thread(target=self._ask, args=(scheduler, signals), name="cfe-why", daemon=True)
        self._thread.start()

    def _ask(self, scheduler: Scheduler, signals: list[str]) -> None:
        self._answer = scheduler.why(signals)

    def answer(self) -> tuple[Cause, str]:
        """The reason and its evidence; waits for them (the scheduler's own calls have time limits)."""
        self._thread.join()
        return self._answer


def conclude(
    folder: RunFolder,
    scheduler: Scheduler,
    recovery: Recovery,
    group: Group,
    *,
    inquiry: Inquiry | None,
    attempt: int,
    step: int | None,
    started_s: float | None = None,
) -> Verdict:
    """Decide what becomes of the run and do it. Collective: all ranks call it, their state saved.

    Rank 0 alone speaks to the scheduler and writes events; the others learn the verdict.

    Args:
        inquiry: rank 0's; None on the others.
        step: steps done, and saved; None when nobody counts them.
        started_s: time.monotonic() of the signal, for the seconds in the events.
    """
    if group.rank == 0:
        assert inquiry is not None
        cause, evidence = inquiry.answer()
        seconds = None if started_s is None else round(time.monotonic() - started_s, 3)
        verdict = _judge(folder, recovery, cause, evidence, attempt)
        fields: dict[str, Any] = {"step": step, "detail": verdict.why, "seconds": seconds}
        if cause == "preempted":
            folder.append_event("preempted", attempt=attempt, **fields)
        if verdict.action == "cancelled":
            folder.append_event("cancelled", attempt=attempt, reason=cause, **fields)
        elif verdict.action == "held":
            hold(folder, attempt=attempt, step=step, why=verdict.why)
        elif verdict.action == "requeued":
            verdict = _requeue(folder, scheduler, verdict, attempt, step)
        group.broadcast(json.dumps(asdict(verdict)).encode())
        return verdict
    return Verdict(**json.loads(group.broadcast(b"")))


def hold(folder: RunFolder, *, attempt: int, step: int | None, why: str) -> None:
    """Hold the run: no further attempt until a person says so. Rank 0, or the supervisor, calls it."""
    folder.promise("held", reason=why, attempt=attempt)
    folder.append_event("held", attempt=attempt, step=step, reason=why)


def _judge(folder: RunFolder, recovery: Recovery, cause: Cause, evidence: str, attempt: int) -> Verdict:
    if cause == "cancelled":
        return Verdict(action="cancelled", cause=cause, why=evidence, exit_code=0)
    if cause == "requeued_already" or cause == "node_failure":
        return Verdict(action="requeued", cause=cause, why=evidence, exit_code=0)
    if cause == "unknown":
        return Verdict(action="killed", cause=cause, why=evidence, exit_code=0)
    decision = decide(recovery, folder.events(), cause=cause)
    if decision.action == "requeue":
        return Verdict(action="requeued", cause=cause, why=evidence, exit_code=0)
    return Verdict(action="held", cause=cause, why=decision.why, exit_code=1)


def _requeue(folder: RunFolder, scheduler: Scheduler, verdict: Verdict, attempt: int, step: int | None) -> Verdict:
    """The call itself. What must be written is written before it: this process may be killed right after."""
    first = folder.promise(f"requeued-{attempt}", reason=verdict.cause, step=step)
    folder.append_event("requeued", attempt=attempt, step=step, reason=verdict.cause, detail=verdict.why)
    if not first or verdict.cause in ("requeued_already", "node_failure"):
        return verdict
    try:
        logger.info("%s: %s", verdict.cause, scheduler.requeue(next_attempt=attempt + 1))
    except CfeError as error:
        why = f"saved, but the requeue failed: {error}"
        if verdict.cause == "preempted":
            # Slurm requeues a preempted job that it has to kill, and forgets one that exits: stay.
            logger.warning("%s; waiting for the kill", why)
            return replace(verdict, action="killed", why=why)
        hold(folder, attempt=attempt, step=step, why=why)
        return replace(verdict, action="held", why=why, exit_code=1)
    return verdict
