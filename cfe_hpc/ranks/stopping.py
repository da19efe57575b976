"""The end of an attempt that was told to stop: reason, verdict, and the requeue, last and once."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError
from cfe_hpc.ranks.scheduler import Cause, Scheduler
from cfe_hpc.recovery import causes
from cfe_hpc.recovery.budgets import decide
from cfe_hpc.recovery.effects import carry_out
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder

__all__ = ["Ended", "Inquiry", "Verdict", "conclude", "hold", "promise_next", "send_back"]

logger = logging.getLogger(__name__)

_RETRY_S = 2.0
# Slurm looks for preempted jobs whose grace is over every 30 s; the rest is for a slow controller.
_KILL_MARGIN_S = 60.0
_REQUEUE_S = 5.0
"""Of the time until the kill, kept for what comes after the save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of the run after this attempt, the same on every rank.

    Attributes:
        action: "requeued": another attempt follows. "cancelled": none ever. "held": none until `requeue RUN`.
            "failed": this was no stop; another rank's failure decides.
        exit_code: for the ranks to exit with.
    """

    action: Literal["requeued", "cancelled", "held", "failed"]
    cause: Cause | causes.Cause
    why: str
    exit_code: int


class Ended(SystemExit):
    """Ends a rank after a verdict: what it means for the run is written down, whatever the status."""


class Inquiry:
    """Asks the scheduler why, beside the save: the answer takes as long as slurmctld likes.

    A scheduler that gives none is asked again, for as long as it may take until it kills this attempt: neither
    exiting nor training on is right before it is known whether the job was preempted or cancelled.
    """

    def __init__(self, scheduler: Scheduler, signals: list[str], spec: RunSpec) -> None:
        self._spec, self._asked_s = spec, time.monotonic()
        self._answer: tuple[Cause, str] = ("unknown", "the scheduler was not asked")
        self._deadline_s = time.monotonic() + _until_killed_s(spec)
        self._thread = threading.Thread(target=self._ask, args=(scheduler, signals), name="cfe-why", daemon=True)
        self._thread.start()

    def _ask(self, scheduler: Scheduler, signals: list[str]) -> None:
        while True:
            self._answer = scheduler.why(signals)
            if self._answer[0] != "unknown" or time.monotonic() > self._deadline_s:
                return
            logger.warning("why the stop? %s; asking again", self._answer[1])
            time.sleep(_RETRY_S)

    @property
    def answered(self) -> bool:
        """Whether `answer` would return at once."""
        return not self._thread.is_alive()

    def time_left_s(self, told_s: float | None) -> float | None:
        """Seconds until this attempt is killed, with some left for the requeue; None when it is not known to be.

        While the reason is not known the worst that this site may do is assumed.

        Args:
            told_s: time.monotonic() of the signal; the inquiry's own beginning when None.
        """
        limits_s = _limits_s(self._spec)
        cause = self._answer[0]
        known = [limits_s[cause]] if cause in limits_s else list(limits_s.values()) if cause == "unknown" else []
        if not known:
            return None
        limit_s = min(known) - min(_REQUEUE_S, min(known) / 4)
        return (self._asked_s if told_s is None else told_s) + limit_s - time.monotonic()

    def answer(self) -> tuple[Cause, str]:
        """The reason and its evidence; waits for them. "unknown" when the scheduler stayed silent throughout."""
        self._thread.join()
        return self._answer


def _limits_s(spec: RunSpec) -> dict[Cause, float]:
    """From the signal to the kill, for each reason that this attempt may be stopped for."""
    limits_s: dict[Cause, float] = {}
    if spec.plan.preemption.ends_attempts or spec.site.scheduler == "local":
        limits_s["preempted"] = spec.plan.preemption.grace or spec.site.slurm.kill_wait
    if spec.plan.time_s is not None:
        limits_s["time_limit"] = spec.plan.signal_lead_s
    return limits_s


def _until_killed_s(spec: RunSpec) -> float:
    """Seconds from the first signal to when a scheduler that means to kill this attempt has done so."""
    return spec.plan.preemption.grace + spec.site.slurm.kill_wait + _KILL_MARGIN_S


def conclude(
    folder: RunFolder,
    scheduler: Scheduler,
    spec: RunSpec,
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
        verdict = _judge(folder, spec, cause, evidence)
        fields: dict[str, Any] = {"step": step, "detail": verdict.why, "seconds": seconds}
        if cause == "preempted":
            folder.note_event("preempted", attempt=attempt, **fields)
        if verdict.action == "cancelled":
            folder.note_event("cancelled", attempt=attempt, reason=cause, **fields)
        elif verdict.action == "held":
            known = None if cause == "unknown" or cause == "requeued_already" else cause
            hold(folder, attempt=attempt, step=step, why=verdict.why, cause=known)
        elif verdict.action == "requeued":
            verdict = _requeue(folder, scheduler, spec, verdict, attempt, step)
        group.broadcast(json.dumps(asdict(verdict)).encode())
        return verdict
    return Verdict(**json.loads(group.broadcast(b"")))


def send_back(
    folder: RunFolder,
    scheduler: Scheduler,
    spec: RunSpec,
    group: Group,
    *,
    cause: causes.Cause,
    why: str,
    attempt: int,
) -> Verdict:
    """End an attempt that nobody told to stop, and ask for another as far as the budget of `cause` allows. Collective.

    What the next attempt does otherwise is written down first, nodes to avoid among it; result.json, when none follows.

    Args:
        why: a sentence for the events; what is wrong has been written down as a `failed` event.
    """
    if group.rank != 0:
        return Verdict(**json.loads(group.broadcast(b"")))
    decision = decide(spec.job.recovery, folder.events(), cause=cause)
    carry_out(folder, decision.effects, attempt=attempt)
    if decision.action == "requeue":
        going_on = Verdict(action="requeued", cause=cause, why=why, exit_code=0)
        verdict = _requeue(folder, scheduler, spec, going_on, attempt, None)
    else:
        hold(folder, attempt=attempt, step=None, why=decision.why, cause=cause)
        verdict = Verdict(action="held", cause=cause, why=decision.why, exit_code=1)
    if verdict.action == "held":
        write_result(folder, "HELD", attempts=attempt + 1, reason=verdict.why)
    group.broadcast(json.dumps(asdict(verdict)).encode())
    return verdict


def hold(
    folder: RunFolder,
    *,
    attempt: int,
    step: int | None,
    why: str,
    cause: causes.Cause | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Hold the run: no further attempt until a person says so. Rank 0, or the supervisor, calls it.

    Args:
        cause: of the end that led to it, where there is one.
        detail: `log` and `line`: where the run's logs say why.
    """
    folder.note("held", "the run is held", reason=why, attempt=attempt)
    folder.note_event("held", attempt=attempt, step=step, cause=cause, reason=why, detail=detail)


def promise_next(folder: RunFolder, *, attempt: int, **facts: Any) -> bool:
    """Promise that another attempt follows; whether the caller is the one to ask for it.

    A disk that takes nothing at all must not lose the run: the attempt is asked for all the same.
    """
    return folder.note(f"requeued-{attempt}", "another attempt follows", **facts)


def _judge(folder: RunFolder, spec: RunSpec, cause: Cause, evidence: str) -> Verdict:
    if cause == "cancelled":
        return Verdict(action="cancelled", cause=cause, why=evidence, exit_code=0)
    if cause == "requeued_already" or cause == "node_failure":
        return Verdict(action="requeued", cause=cause, why=evidence, exit_code=0)
    if cause == "failed":
        return Verdict(action="failed", cause=cause, why=evidence, exit_code=1)
    if cause == "unknown":
        # To requeue might bring back what was cancelled; to end silently would lose what was preempted.
        why = f"told to stop, and the scheduler never said why: {evidence}"
        return Verdict(action="held", cause=cause, why=why, exit_code=1)
    decision = decide(spec.job.recovery, folder.events(), cause=cause)
    if decision.action == "requeue":
        return Verdict(action="requeued", cause=cause, why=evidence, exit_code=0)
    return Verdict(action="held", cause=cause, why=decision.why, exit_code=1)


def _requeue(
    folder: RunFolder, scheduler: Scheduler, spec: RunSpec, verdict: Verdict, attempt: int, step: int | None
) -> Verdict:
    """The call itself. What must be written is written before it: this process may be killed right after."""
    if not promise_next(folder, attempt=attempt, reason=verdict.cause, step=step):
        return verdict
    folder.note_event("requeued", attempt=attempt, step=step, reason=verdict.cause, detail=verdict.why)
    if verdict.cause in ("requeued_already", "node_failure"):
        return verdict
    deadline_s = time.monotonic() + _patience_s(spec, verdict.cause)
    while True:
        try:
            logger.info("%s: %s", verdict.cause, scheduler.requeue(next_attempt=attempt + 1))
            return verdict
        except CfeError as error:
            logger.warning("saved, but the requeue failed: %s", error)
            if time.monotonic() > deadline_s:
                why = f"saved, but the requeue failed: {error}"
                hold(folder, attempt=attempt, step=step, why=why)
                return replace(verdict, action="held", why=why, exit_code=1)
        time.sleep(_RETRY_S)


def _patience_s(spec: RunSpec, cause: Cause | causes.Cause) -> float:
    """Seconds for which a requeue that fails is tried again, before the run is held."""
    if cause == "time_limit":
        return spec.plan.signal_lead_s
    if cause == "preempted" and spec.plan.preemption.mode == "cancel":
        return spec.plan.preemption.grace / 2
    # Slurm itself requeues a preempted job that it has to kill, and forgets one that exits: stay until then.
    return _until_killed_s(spec)
