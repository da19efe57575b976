"""Verbs on a whole sweep: tasks sent again under their numbers, all of them cancelled, or put back in the queue."""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import SchedulerError, UsageError
from cfe_hpc.launch.backend import Backend, backend_for
from cfe_hpc.launch.jobs import all_jobs, latest_attempt, latest_job
from cfe_hpc.launch.states import JobState
from cfe_hpc.ranks.array_states import unranged
from cfe_hpc.ranks.jobrecords import record, records, unused_attempt
from cfe_hpc.recovery.result import write_result
from cfe_hpc.recovery.sweep_result import settle
from cfe_hpc.runfolder import RunFolder

__all__ = ["Retried", "cancel_sweep", "jobs_to_await", "retry_tasks", "save_tasks"]

_OVER = ("COMPLETED", "FAILED", "CANCELLED")
_ENDING_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """Tasks that were sent again.

    Attributes:
        tasks: their numbers.
        job_ids: of what was sent.
    """

    tasks: tuple[int, ...]
    job_ids: tuple[str, ...]


def retry_tasks(sweep: RunFolder, numbers: Sequence[int]) -> Retried:
    """Send tasks again, none of which runs or waits, each going on from its own newest checkpoint.

    Raises:
        SchedulerError: it was refused, or a job that ran one of them does not end; everything stands as before.
    """
    spec = RunSpec.read(sweep.run_toml)
    backend = backend_for(spec.site.scheduler)
    _wait_until_over(backend, [sweep.task(number) for number in numbers], spec)
    ended, cancelled = sweep.result(), sweep.promised("cancel") is not None
    undo = [_reopened(sweep.task(number), again=cancelled) for number in numbers]
    sweep.result_path.unlink(missing_ok=True)
    try:
        job_ids = backend.submit_tasks(spec, sweep, numbers)
    except SchedulerError:
        for put_back in undo:
            put_back()
        if ended is not None:
            sweep.write_result(ended)
        raise
    if spec.site.scheduler == "slurm":  # this machine's runner records the task's own process
        arrays = [job for job in all_jobs(sweep) if job["job_id"] in job_ids]
        job_of = {number: f"{job['job_id']}_{number - int(job['offset'])}" for job in arrays for number in _tasks(job)}
        for number in numbers:
            _note_again(sweep.task(number), job_of[number])
    return Retried(tasks=tuple(numbers), job_ids=tuple(job_ids))


def _wait_until_over(backend: Backend, tasks: Sequence[RunFolder], spec: RunSpec) -> None:
    """Wait for batch scripts, or supervisors, that still look at what the ranks of an attempt have left."""
    deadline_s = time.monotonic() + _ENDING_S
    while ending := [job.job_id for job in _known(backend, tasks).values() if job.state == "RUNNING"]:
        if time.monotonic() > deadline_s:
            raise SchedulerError(f"job {ending[0]}: is still ending; try again in a moment")
        time.sleep(min(1.0, spec.site.slurm.poll_interval))


def _reopened(task: RunFolder, *, again: bool) -> Callable[[], None]:
    """Make a task fit to begin again; what makes it as it was.

    Args:
        again: its whole sweep was cancelled: the task is to be told from those that stay so.
    """
    if not again and not task.path.is_dir():
        return lambda: None
    task.control.mkdir(parents=True, exist_ok=True)
    result, held, cancel = task.result(), task.promised("held"), task.promised("cancel")
    (task.control / "cancel").unlink(missing_ok=True)  # who asks for a cancelled task again means it
    newly = again and task.promise("again", user=getpass.getuser())
    task.reopen()

    def put_back() -> None:
        for name, facts in (("held", held), ("cancel", cancel)):
            if facts is not None:
                task.promise(name, **facts)
        if newly:
            (task.control / "again").unlink(missing_ok=True)
        if result is not None:
            task.write_result(result)

    return put_back


def _note_again(task: RunFolder, job_id: str) -> None:
    """Tell a task's own folder of the job that goes on with it: of those that have not started there is none."""
    if not task.run_toml.exists():
        return
    attempt = latest_attempt(task)
    if not any(job.get("job_id") == job_id for job in records(task, "job")):
        record(task, "job", job_id=job_id, scheduler="slurm", attempt_base=unused_attempt(task))
    task.append_event("requeued", attempt=attempt, reason="requeue_requested", detail=f"as job {job_id}")


def _tasks(job: dict[str, Any]) -> list[int]:
    return list(unranged(str(job["tasks"])))


def jobs_to_await(sweep: RunFolder) -> list[str]:
    """What Slurm knows the end of the sweep by: its arrays; tasks one by one of an array of which some were sent again,
    or where a task that is preempted goes on in a job of its own.

    Raises:
        UsageError: it is no sweep of Slurm's, or a task has ended otherwise than well.
    """
    newest: dict[int, dict[str, Any]] = {}
    for job in all_jobs(sweep):
        if job.get("scheduler") != "slurm":
            raise UsageError(f"--after: {sweep.run_id}: is no sweep of Slurm's; submit without --after")
        newest.update((number, job) for number in _tasks(job))
    one_by_one = RunSpec.read(sweep.run_toml).plan.preemption.mode == "cancel"
    found: dict[str, None] = {}
    for number, job in newest.items():
        array, task = str(job["job_id"]), sweep.task(number)
        state = (task.result() or {}).get("state")
        if state not in (None, "COMPLETED"):
            raise UsageError(f"--after: {task.run_id}: ended {state}; give `cfe-hpc retry {sweep.run_id}` first")
        whole = not one_by_one and all(newest[each] is job for each in _tasks(job))
        if whole or state is None:
            own = latest_job(task)
            found[array if whole else str(own["job_id"]) if own else f"{array}_{number - int(job['offset'])}"] = None
    return list(found)


def cancel_sweep(sweep: RunFolder) -> int:
    """End every task that has not ended, for good, and let none start. Doing it again does no harm.

    Returns:
        How many tasks that had started were cancelled; the others never start.

    Raises:
        SchedulerError: the scheduler cannot be reached; the promises stand, and giving the command again finishes it.
    """
    spec = RunSpec.read(sweep.run_toml)
    backend = backend_for(spec.site.scheduler)
    sweep.promise("cancel", user=getpass.getuser())
    for task in sweep.tasks():  # sent again after an earlier cancel: this one means them, too
        (task.control / "again").unlink(missing_ok=True)
    open_tasks = [task for task in sweep.tasks() if (task.result() or {"state": "HELD"}).get("state") == "HELD"]
    for task in open_tasks:
        if task.run_toml.exists():
            task.promise("cancel", user=getpass.getuser())
    known = _known(backend, [sweep, *open_tasks])
    for job in _live(sweep, known) + [job for task in open_tasks for job in _live(task, known, but=sweep)]:
        backend.cancel(job)
    sweep.append_event("cancelled", attempt=None, reason="cancelled by the user")
    for task in open_tasks:
        attempt = latest_attempt(task)
        training = attempt is not None and task.promised(f"requeued-{attempt}") is None
        if not training or not any(known[_id(job)].state == "RUNNING" for job in _live(task, known)):
            task.append_event("cancelled", attempt=attempt, reason="cancelled while no attempt was running")
            attempts = 0 if attempt is None else attempt + 1
            write_result(task, "CANCELLED", attempts=attempts, reason="cancelled by the user")
    settle(sweep, last=0)
    return len(open_tasks)


def save_tasks(sweep: RunFolder) -> list[int]:
    """Have every task that trains save and go back to the queue; their numbers.

    Raises:
        SchedulerError: the scheduler refused or cannot be reached.
    """
    spec = RunSpec.read(sweep.run_toml)
    backend = backend_for(spec.site.scheduler)
    training = [task for task in sweep.tasks() if task.result() is None and latest_attempt(task) is not None]
    known = _known(backend, training)
    told = []
    for task in training:
        job, attempt = latest_job(task), latest_attempt(task)
        if job is None or _id(job) not in known or known[_id(job)].state != "RUNNING":
            continue
        task.promise(f"requeue-{attempt}", user=getpass.getuser())
        backend.request_save(job, spec)
        told.append(task.sweep_task or 0)
    return told


def _known(backend: Backend, folders: Iterable[RunFolder]) -> dict[str, JobState]:
    """What the scheduler says of all their jobs, asked once."""
    return backend.states([job for folder in folders for job in all_jobs(folder)])


def _id(job: dict[str, Any]) -> str:
    return str(job["job_id"])


def _live(folder: RunFolder, known: dict[str, JobState], *, but: RunFolder | None = None) -> list[dict[str, Any]]:
    """The folder's jobs that have not ended; but those of which an array of `but` is told as a whole."""
    told = set() if but is None else {_id(job) for job in all_jobs(but)}
    return [
        job
        for job in all_jobs(folder)
        if _id(job) in known and known[_id(job)].state not in _OVER and _id(job).partition("_")[0] not in told
    ]
