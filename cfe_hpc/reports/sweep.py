"""The state of a sweep: a row for each task, counts, and the best by a metric."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cfe_hpc.config.tasks import Tasks
from cfe_hpc.files import read_ndjson, read_toml
from cfe_hpc.ranks.array_states import unranged
from cfe_hpc.ranks.jobrecords import records
from cfe_hpc.recovery.attempts import read_attempts
from cfe_hpc.recovery.causes import Cause
from cfe_hpc.reports.status import RunState, RunStatus, SchedulerWord, is_settled, read_status
from cfe_hpc.runfolder import RunFolder

__all__ = ["TaskStatus", "best_of", "counts", "live_jobs", "metric_of", "read_sweep", "summary"]

_TAIL_BYTES = 64 * 1024
_ORDER: tuple[RunState, ...] = ("RUNNING", "PENDING", "HELD", "FAILED", "CANCELLED", "COMPLETED")
"""A sweep is in the first of these that any of its tasks is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """One task of a sweep.

    Attributes:
        task: its number.
        values: what it got of the axes: dotted key to value.
        metric: the last value it logged of the metric that was asked for; None when there is none.
        started: its folder is there.
        cause: why its newest attempt ended badly, where it did.
        status: as `status` has it of a run; of a task that has not started only what the scheduler says.
    """

    task: int
    values: dict[str, Any]
    metric: float | None
    started: bool
    cause: Cause | None
    status: RunStatus


def live_jobs(sweep: RunFolder) -> list[dict[str, Any]]:
    """The records of all jobs that may have a word on a task that has not ended: what to ask the scheduler about."""
    jobs = {str(job["job_id"]): job for job in records(sweep, "job")}
    # On Slurm a task's first job is one of an array's; here it is a process of its own.
    name = "job-1" if all(job.get("scheduler") == "slurm" for job in jobs.values()) else "job"
    for task in sweep.tasks():
        if os.path.exists(task.control / name) and not is_settled(task):
            own = {str(job["job_id"]): job for job in records(task, "job")}
            jobs.update((job_id, job) for job_id, job in own.items() if job_id.partition("_")[0] not in jobs)
    return list(jobs.values())


def read_sweep(
    sweep: RunFolder, words: Mapping[str, SchedulerWord], *, metric: str | None = None, brief: bool = False
) -> list[TaskStatus]:
    """Every task's state, by number.

    Args:
        words: the scheduler's on `live_jobs`, by job id; of arrays task by task.
        metric: name of a logged value to look up.
        brief: of tasks that have ended only what result.json says: no attempt, job or cause.

    Raises:
        ConfigError: sweep.json cannot be read.
    """
    tasks = Tasks.read(sweep.sweep_json)
    array_of = _arrays(sweep)
    # A node that lacks what the task needs leaves a result and nothing else.
    made = sweep.tasks()
    started = {t.sweep_task for t in made if os.path.exists(t.run_toml) or os.path.exists(t.result_path)}
    cancelled = sweep.promised("cancel") is not None
    found = []
    for number in range(tasks.tasks):
        folder, job = sweep.task(number), array_of.get(number)
        if number in started:
            ended = _of_ended(folder, job) if brief else None
            status, cause = (ended, None) if ended is not None else _of_started(folder, job, words)
        else:
            status, cause = _of_waiting(folder, job, words, cancelled=cancelled and folder.is_cancelled), None
        value = None if metric is None or number not in started else _metric(folder, metric)
        found.append(
            TaskStatus(
                task=number,
                values=tasks.values(number),
                metric=value,
                started=number in started,
                cause=cause,
                status=status,
            )
        )
    return found


def _arrays(sweep: RunFolder) -> dict[int, str]:
    """Task to the newest job that was sent for it along with others: `<array>_<index>`, or a local runner."""
    found: dict[int, str] = {}
    for job in records(sweep, "job"):
        job_id, offset = str(job["job_id"]), int(job.get("offset", 0))
        is_array = job.get("scheduler") == "slurm"
        found.update(
            (task, f"{job_id}_{task - offset}" if is_array else job_id) for task in unranged(str(job["tasks"]))
        )
    return found


def _of_started(
    folder: RunFolder, array: str | None, words: Mapping[str, SchedulerWord]
) -> tuple[RunStatus, Cause | None]:
    own = records(folder, "job")
    job_id = str(own[-1]["job_id"]) if own else array
    word = words.get(job_id or "")
    status = read_status(folder, job_id=job_id, word=word)
    attempts = read_attempts(folder.events()) if status.state in ("FAILED", "HELD") else []
    return status, _cause(attempts[-1].cause if attempts else None, status)


def _cause(told: Cause | None, status: RunStatus) -> Cause | None:
    """Why a task ended badly; what killed it whole is known to the scheduler alone."""
    if status.state not in ("FAILED", "HELD"):
        return None
    reason = status.reason.lower()
    if "timelimit" in reason or "timeout" in reason:
        return "time_limit"
    return "node_failure" if "node_fail" in reason or "nodefail" in reason else told


def _of_waiting(
    folder: RunFolder, job_id: str | None, words: Mapping[str, SchedulerWord], *, cancelled: bool
) -> RunStatus:
    """The status of a task whose folder is not there: no attempt of it has begun."""
    word = words.get(job_id or "")
    state: RunState = "FAILED"
    reason = f"vanished: the scheduler no longer knows {job_id}, and the task never started"
    if cancelled or (word is not None and word.state == "CANCELLED"):
        state, reason = "CANCELLED", "cancelled before it started"
    elif word is not None and word.state in ("PENDING", "RUNNING", "HELD", "UNKNOWN"):
        state = "HELD" if word.state == "HELD" else "PENDING"
        reason = word.reason or ("is starting" if word.state == "RUNNING" else "")
    elif word is not None:
        reason = f"ended ({word.reason or word.state}) before its ranks started: see {folder.logs}"
    return _plain(folder, state, job_id, reason)


def _of_ended(folder: RunFolder, job_id: str | None) -> RunStatus | None:
    """The status of a task by its result alone; None while there is none."""
    result = folder.result()
    if result is None or result.get("state") not in _ORDER:
        return None
    status = _plain(folder, result["state"], job_id, str(result.get("reason") or ""))
    return replace(status, step=result.get("final_step"), lost_steps=result.get("lost_steps") or 0)


def _plain(folder: RunFolder, state: RunState, job_id: str | None, reason: str) -> RunStatus:
    return RunStatus(
        run_id=folder.run_id,
        state=state,
        job_id=job_id,
        attempt=None,
        step=None,
        total_steps=None,
        lost_steps=0,
        goodput=None,
        heartbeat_age_s=None,
        reason=reason,
        run_dir=str(folder.path),
        buckets={},
    )


def metric_of(sweep: RunFolder, asked: str | None = None) -> tuple[str, Literal["min", "max"]] | None:
    """(metric, its better end) to compare tasks by: the one asked for as `NAME:min`, else the job's keep_best."""
    text = asked or read_toml(sweep.run_toml).get("job", {}).get("checkpoint", {}).get("keep_best")
    name, _, end = str(text or "").rpartition(":")
    return (name, "max" if end == "max" else "min") if name else None


def best_of(tasks: Sequence[TaskStatus], end: Literal["min", "max"]) -> TaskStatus | None:
    """The task with the best metric; None when none has any."""
    known = [task for task in tasks if task.metric is not None]
    sign = 1 if end == "min" else -1
    return min(known, key=lambda task: (sign * (task.metric or 0.0), task.task), default=None)


def counts(tasks: Sequence[TaskStatus]) -> dict[RunState, int]:
    """How many tasks are in each state that any is in."""
    number = Counter(task.status.state for task in tasks)
    return {state: number[state] for state in _ORDER if number[state]}


def summary(sweep: RunFolder, tasks: Sequence[TaskStatus]) -> RunStatus:
    """The sweep as one run: steps are tasks that have ended well, of all there are."""
    number = counts(tasks)
    jobs = records(sweep, "job")
    ages = [task.status.heartbeat_age_s for task in tasks if task.status.state == "RUNNING"]
    known_ages = [age for age in ages if age is not None]
    return RunStatus(
        run_id=sweep.run_id,
        state=next(iter(number), "FAILED"),
        job_id=str(jobs[-1]["job_id"]) if jobs else None,
        attempt=None,
        step=number.get("COMPLETED", 0),
        total_steps=len(tasks),
        lost_steps=sum(task.status.lost_steps for task in tasks),
        goodput=None,
        heartbeat_age_s=min(known_ages, default=None),
        reason="tasks: " + ", ".join(f"{count} {state}" for state, count in number.items()),
        run_dir=str(sweep.path),
        buckets={},
    )


def _metric(folder: RunFolder, name: str) -> float | None:
    """The last value of a metric: as the result has it, else as the newest heartbeat with it does."""
    value = ((folder.result() or {}).get("metrics") or {}).get(name)
    if value is None:
        for beat in read_ndjson(folder.heartbeat_path, last_bytes=_TAIL_BYTES):
            value = beat.get(name, value)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
