"""What the scheduler knows of this attempt at the moment of a signal, and the one call that asks for another.

The signal alone does not tell why it came: a preemption and a `scancel` both send TERM. Slurm's own record does
(measured on 22.05): a preempted job has a PreemptTime, a cancelled one is COMPLETING without, a requeued one has
one restart more than this attempt was started with, and near its time limit the clock is close to EndTime.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Literal, Protocol

from cfe_hpc.config.run import Plan
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.avoiding import tell_requeued
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.records import record
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s, parse_duration_s

__all__ = [
    "TIMER",
    "Cause",
    "JobRecord",
    "LocalScheduler",
    "NoScheduler",
    "Scheduler",
    "SlurmScheduler",
    "ask_for_another",
    "choose",
    "show_job",
]

logger = logging.getLogger(__name__)

Cause = Literal[
    "preempted", "time_limit", "cancelled", "requeue_requested", "requeued_already", "node_failure", "failed", "unknown"
]

TIMER = "timer"
"""Stands among the names of signals for a stop that the run's own clock asks for, before the time limit."""

# scontrol waits for a busy slurmctld; a stop cannot wait for ever, and its grace is seconds on some sites.
_SCONTROL_TIMEOUT_S = 15.0
# Slurm may send the signal before the time limit up to 60 s early; saving takes its time too.
_EARLY_SIGNAL_S = 60.0


class Scheduler(Protocol):
    """What rank 0 asks of the scheduler. Only rank 0 calls it."""

    def why(self, signals: list[str]) -> tuple[Cause, str]:
        """Why the stop signals came, and a sentence of evidence. Never raises."""

    def stopping_already(self) -> bool:
        """Whether a stop was asked for before this process could hear signals. Never raises."""

    def requeue(self, *, next_attempt: int) -> str:
        """Ask for another attempt: last and once; the processes of this one may be killed at any moment after.

        Returns:
            What was done, for the event.

        Raises:
            CfeError: the scheduler refused or could not be reached.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """The part of `scontrol show job` that tells reasons apart. Times are seconds since the epoch.

    Attributes:
        requeue: the job may be requeued.
    """

    state: str
    preempt_time: float | None
    end_time: float | None
    restarts: int
    time_limited: bool
    past_limit: bool
    requeue: bool

    @classmethod
    def parse(cls, shown: str) -> JobRecord:
        """Read the output of `scontrol show job -o ID`."""
        words = record(shown)
        limit_s, run_s = _seconds(words.get("TimeLimit")), _seconds(words.get("RunTime"))
        return cls(
            state=words.get("JobState", "UNKNOWN"),
            preempt_time=epoch_s(words.get("PreemptTime")),
            end_time=epoch_s(words.get("EndTime")),
            restarts=int(words.get("Restarts", "0")),
            time_limited=limit_s is not None,
            past_limit=limit_s is not None and run_s is not None and run_s >= limit_s,
            requeue=words.get("Requeue") != "0",
        )


def _seconds(clock: str | None) -> float | None:
    try:
        return parse_duration_s(clock or "")
    except ValueError:  # "UNLIMITED", "Partition_Limit"
        return None


def asked_by_user(folder: RunFolder, attempt: int) -> tuple[Cause, str] | None:
    """What `cancel RUN` or `requeue RUN` left in the run folder for this attempt, if anything. Cancel wins."""
    cancel = folder.promised("cancel")
    if cancel is not None:
        return "cancelled", f"cancel asked for by {cancel.get('user', 'the user')}"
    asked = folder.promised(f"requeue-{attempt}")
    if asked is not None:
        return "requeue_requested", f"requeue asked for by {asked.get('user', 'the user')}"
    return None


def _by_own_clock(signals: list[str]) -> tuple[Cause, str] | None:
    """A stop that nobody asked for but the run's own timer needs no looking into."""
    return ("time_limit", "its own timer: the time limit is near") if signals == [TIMER] else None


class SlurmScheduler:
    """Slurm, through scontrol on the node."""

    def __init__(self, folder: RunFolder, facts: RankFacts, plan: Plan) -> None:
        self._folder, self._facts, self._plan = folder, facts, plan
        self._restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def why(self, signals: list[str]) -> tuple[Cause, str]:
        asked = asked_by_user(self._folder, self._facts.attempt) or _by_own_clock(signals)
        if asked:
            return asked
        try:
            verdict = self._judge(show_job(self._facts.job_id), signals, time.time())
            if verdict[0] == "requeue_requested" and "SIGTERM" in signals:
                # A record read in the very moment of a scancel may still say RUNNING: look twice.
                time.sleep(1.0)
                verdict = self._judge(show_job(self._facts.job_id), signals, time.time())
        except CommandError as error:
            return "unknown", f"scontrol gave no answer: {error}"
        return verdict

    def _judge(self, record: JobRecord, signals: list[str], now: float) -> tuple[Cause, str]:
        if record.restarts > self._restarts:
            return "requeued_already", f"scontrol shows {record.restarts} restarts: requeued by someone else"
        if record.state == "NODE_FAIL":
            return "node_failure", "scontrol shows NODE_FAIL"
        if record.preempt_time is not None:
            return "preempted", f"scontrol shows PreemptTime, state {record.state}"
        if record.state == "TIMEOUT" or record.past_limit:
            return "time_limit", "the time limit has passed"
        if record.state not in ("RUNNING", "SUSPENDED"):
            return "cancelled", f"scontrol shows {record.state} and no PreemptTime"
        lead_s = self._plan.signal_lead_s + _EARLY_SIGNAL_S
        if record.time_limited and record.end_time is not None and record.end_time - now <= lead_s:
            return "time_limit", f"{record.end_time - now:.0f} s to the time limit"
        return "requeue_requested", f"{'+'.join(signals)} sent by hand: scontrol shows {record.state}, no PreemptTime"

    def stopping_already(self) -> bool:
        if asked_by_user(self._folder, self._facts.attempt):
            return True
        try:
            return show_job(self._facts.job_id).preempt_time is not None
        except CommandError as error:
            logger.warning("scontrol is of no use on this node (%s): reasons of signals cannot be told apart", error)
            return False

    def requeue(self, *, next_attempt: int) -> str:
        return ask_for_another(self._folder, self._plan, self._facts.job_id, next_attempt=next_attempt)


def show_job(job_id: str) -> JobRecord:
    """What Slurm says of a job now.

    Raises:
        CommandError: it says nothing.
    """
    return JobRecord.parse(run(["scontrol", "show", "job", "-o", job_id], timeout_s=_SCONTROL_TIMEOUT_S).stdout)


def ask_for_another(folder: RunFolder, plan: Plan, job_id: str, *, next_attempt: int) -> str:
    """Have Slurm requeue the job off the nodes that are avoided, or send a successor where it does not requeue: after a
    preemption in a partition that cancels, and for a job that may not be requeued. See Scheduler.requeue."""
    if plan.preemption.mode == "cancel" and show_job(job_id).preempt_time is not None:
        return _send_successor(folder, job_id, next_attempt, "this partition cancels preempted jobs")
    try:
        run(["scontrol", "requeue", job_id], timeout_s=_SCONTROL_TIMEOUT_S)
    except CommandError:
        if show_job(job_id).requeue:
            raise
        return _send_successor(folder, job_id, next_attempt, "this job may not be requeued (Requeue=0)")
    tell_requeued(folder, plan, job_id, attempt=next_attempt - 1)
    return f"scontrol requeue {job_id}"


def _send_successor(folder: RunFolder, job_id: str, next_attempt: int, why: str) -> str:
    from cfe_hpc.ranks.successor import submit_successor

    successor = submit_successor(folder, job_id=job_id, next_attempt=next_attempt)
    return f"{why}: successor {successor} submitted on the same run folder"


class LocalScheduler:
    """Our own supervisor on this machine: it reads the run folder when the ranks have ended."""

    def __init__(self, folder: RunFolder, facts: RankFacts) -> None:
        self._folder, self._facts = folder, facts

    def why(self, signals: list[str]) -> tuple[Cause, str]:
        asked = asked_by_user(self._folder, self._facts.attempt) or _by_own_clock(signals)
        if asked:
            return asked
        stop = self._folder.promised(f"stop-{self._facts.attempt}") or {}
        if stop.get("reason") == "time_limit":
            return "time_limit", "the supervisor's clock"
        if stop.get("reason") == "failed":
            return "failed", "another rank failed"
        # A TERM straight to a rank is how a site without a supervisor, or a user, takes the machine back.
        return "preempted", f"{'+'.join(signals) or 'stop'} on this machine"

    def stopping_already(self) -> bool:
        asked = asked_by_user(self._folder, self._facts.attempt)
        return asked is not None or self._folder.promised(f"stop-{self._facts.attempt}") is not None

    def requeue(self, *, next_attempt: int) -> str:
        return "the supervisor starts the next attempt"


class NoScheduler:
    """A script run by hand: nobody starts it again but its user."""

    def why(self, signals: list[str]) -> tuple[Cause, str]:
        return "cancelled", f"{'+'.join(signals)} without a scheduler"

    def stopping_already(self) -> bool:
        return False

    def requeue(self, *, next_attempt: int) -> str:
        raise AssertionError("a run without a scheduler is never requeued")


def choose(folder: RunFolder, facts: RankFacts, plan: Plan) -> Scheduler:
    """The scheduler that started this attempt."""
    if facts.scheduler == "slurm":
        return SlurmScheduler(folder, facts, plan)
    if facts.scheduler == "local":
        return LocalScheduler(folder, facts)
    return NoScheduler()
