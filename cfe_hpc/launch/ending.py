"""Ending a run for good, and sending one back to the queue, whatever state it is in."""

from __future__ import annotations

import getpass
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import SchedulerError, UsageError
from cfe_hpc.launch.backend import Backend, backend_for
from cfe_hpc.launch.dependencies import awaited, dependents, take_along
from cfe_hpc.launch.jobs import all_jobs, latest_attempt, latest_job, unused_attempt
from cfe_hpc.launch.states import JobState, RunState
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder

__all__ = ["Outcome", "behind", "cancel", "requeue", "send_followers"]

_ENDING_S = 30.0
_OVER: tuple[RunState, ...] = ("COMPLETED", "FAILED", "CANCELLED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was done.

    Attributes:
        action: "cancelled": it will end, or has; "ended": it had ended before; "signalled": the running attempt
            saves and goes back to the queue; "resubmitted": a new job goes on with it; "released": a hold in the
            queue was lifted; "waiting": it waits in the queue already.
        job_id: of the job it was done to, or of the new one.
        text: a sentence for people.
        followers: ids of the runs that were sent again with it, having waited for it in vain.
    """

    action: Literal["cancelled", "ended", "signalled", "resubmitted", "released", "waiting"]
    job_id: str | None
    text: str
    followers: tuple[str, ...] = ()


def cancel(folder: RunFolder) -> Outcome:
    """End a run for good. Doing it again does no harm.

    The promise comes first: whoever sees the job end after it, rank, supervisor or batch script, knows that no
    further attempt may follow.

    Raises:
        SchedulerError: the scheduler cannot be reached; the promise stands, and giving the command again finishes it.
    """
    spec = RunSpec.read(folder.run_toml)
    result = folder.result()
    if result is not None and result.get("state") != "HELD":
        return Outcome(action="ended", job_id=_job_id(folder), text=f"{folder.run_id}: ended before: {result['state']}")
    folder.promise("cancel", user=getpass.getuser())
    backend = backend_for(spec.site.scheduler)
    jobs = all_jobs(folder)
    # A successor may wait while its predecessor still ends: all jobs of the run are meant.
    known = backend.states(jobs)
    live = [job for job in jobs if str(job["job_id"]) in known and known[str(job["job_id"])].state not in _OVER]
    for job in live:
        backend.cancel(job)
    attempt = latest_attempt(folder)
    training = attempt is not None and folder.promised(f"requeued-{attempt}") is None
    if not training or not any(known[str(job["job_id"])].state == "RUNNING" for job in live):
        # No rank is there to write it, or only those that have handed on to the next attempt, or are starting up.
        _write_cancelled(folder)
    return Outcome(action="cancelled", job_id=_job_id(folder), text=f"{folder.run_id}: cancelled, never to be requeued")


def _write_cancelled(folder: RunFolder) -> None:
    attempt = latest_attempt(folder)
    folder.append_event("cancelled", attempt=attempt, reason="cancelled while no attempt was running")
    attempts = 0 if attempt is None else attempt + 1
    write_result(folder, "CANCELLED", attempts=attempts, reason="cancelled by the user")


def requeue(folder: RunFolder) -> Outcome:
    """Let a running attempt save and go back to the queue; send a failed or held run to the queue again, and with it
    those that waited for it in vain.

    Raises:
        UsageError: the run has completed or was cancelled, or waits for one that has ended otherwise.
        SchedulerError: the scheduler refused or cannot be reached.
    """
    spec = RunSpec.read(folder.run_toml)
    state = (folder.result() or {}).get("state")
    if state == "COMPLETED":
        raise UsageError(f"{folder.run_id}: has completed; nothing is left to do: submit the job again for another run")
    if folder.promised("cancel") is not None or (state == "CANCELLED" and not _never_started(folder, spec)):
        raise UsageError(f"{folder.run_id}: was cancelled, and a cancelled run is never requeued; submit the job again")
    backend = backend_for(spec.site.scheduler)
    job = latest_job(folder)
    known = None if job is None else _settled(backend, job, spec, ended=state is not None)
    if job is None or known is None or known.state in _OVER:
        return _resubmit(folder, spec, backend)
    return _nudge(folder, spec, backend, job, known)


def _settled(backend: Backend, job: dict[str, object], spec: RunSpec, *, ended: bool) -> JobState | None:
    """What the scheduler knows of the job, once a job whose ranks have `ended` is over: until then its batch script,
    or supervisor, may still look at what they left."""
    deadline_s = time.monotonic() + _ENDING_S
    while True:
        known = backend.states([job]).get(str(job["job_id"]))
        if not ended or known is None or known.state != "RUNNING":
            return known
        if time.monotonic() > deadline_s:
            raise SchedulerError(f"job {known.job_id}: is still ending ({known.word}); try again in a moment")
        time.sleep(min(1.0, spec.site.slurm.poll_interval))


def _nudge(folder: RunFolder, spec: RunSpec, backend: Backend, job: dict[str, object], known: JobState) -> Outcome:
    """Do to a job that the scheduler knows what brings it back to the queue."""
    job_id, run_id = known.job_id, folder.run_id
    if known.state == "HELD":
        folder.reopen()
        backend.release(job)
        return Outcome(action="released", job_id=job_id, text=f"{run_id}: job {job_id} released from its hold")
    if known.state == "PENDING":
        return Outcome(action="waiting", job_id=job_id, text=f"{run_id}: job {job_id} waits already ({known.reason})")
    attempt = latest_attempt(folder)
    if attempt is None:
        raise UsageError(f"{run_id}: its ranks are only just starting, with nothing to save; try again in a moment")
    folder.promise(f"requeue-{attempt}", user=getpass.getuser())
    backend.request_save(job, spec)
    text = f"{run_id}: attempt {attempt} saves and goes back to the queue"
    return Outcome(action="signalled", job_id=job_id, text=text)


def _never_started(folder: RunFolder, spec: RunSpec) -> bool:
    """Whether the run has waited in vain for others, and nobody has cancelled it."""
    begun = latest_attempt(folder) is not None or folder.tasks()
    return bool(spec.after) and not begun and folder.promised("cancel") is None


def _resubmit(folder: RunFolder, spec: RunSpec, backend: Backend) -> Outcome:
    before = _job_id(folder)
    job_id = _send_again(folder, spec, backend)
    if spec.site.scheduler == "slurm" and before is not None:
        take_along(before, job_id)  # those that Slurm has not dropped yet
    followers = send_followers(folder.top)
    text = f"{folder.run_id}: goes on as job {job_id}{behind(followers)}"
    return Outcome(action="resubmitted", job_id=job_id, text=text, followers=tuple(followers))


def behind(followers: Sequence[str]) -> str:
    """The end of a sentence about what was sent again, and these runs with it."""
    return f"; {', '.join(followers)} follow it" if followers else ""


def send_followers(folder: RunFolder) -> list[str]:
    """Send the runs again that were to follow one that ended badly, and goes on now, and those that were to follow
    them; their ids.

    Raises:
        SchedulerError: the scheduler refused or cannot be reached.
    """
    sent = []
    for follower in dependents(folder):
        spec = RunSpec.read(follower.run_toml)
        backend = backend_for(spec.site.scheduler)
        if not _never_started(follower, spec) or _is_live(follower, backend):
            continue
        upstream = [RunFolder(Path(path)) for path in spec.after]
        # One that was to follow this run, too, brings its own followers when its turn has come.
        if all((each.result() or {}).get("state") == "COMPLETED" or _is_live(each, backend) for each in upstream):
            try:
                _send_again(follower, spec, backend)
            except UsageError:  # tasks of a sweep that it waits for have ended badly, and were not sent again
                continue
            sent += [follower.run_id, *send_followers(follower)]
    return sent


def _is_live(folder: RunFolder, backend: Backend) -> bool:
    """Whether the scheduler has a job of the run that has not ended."""
    job = latest_job(folder)
    known = None if job is None else backend.states([job]).get(str(job["job_id"]))
    return known is not None and known.state not in _OVER


def _send_again(folder: RunFolder, spec: RunSpec, backend: Backend) -> str:
    """A new job on the run folder; its id."""
    after = awaited((RunFolder(Path(path)) for path in spec.after), by=folder)
    attempt = latest_attempt(folder)
    result, held = folder.result(), folder.promised("held")
    folder.reopen()
    try:
        if folder.is_sweep:
            from cfe_hpc.config.tasks import Tasks  # late: few runs are sweeps

            job_id = backend.submit_tasks(spec, folder, range(Tasks.read(folder.sweep_json).tasks), after=after)[0]
        else:
            job_id = backend.resubmit(spec, folder, next_attempt=unused_attempt(folder), after=after)
    except SchedulerError:
        if held is not None:
            folder.promise("held", **held)
        if result is not None:
            folder.write_result(result)
        raise
    folder.append_event("requeued", attempt=attempt, reason="requeue_requested", detail=f"as job {job_id}")
    return job_id


def _job_id(folder: RunFolder) -> str | None:
    job = latest_job(folder)
    return None if job is None else str(job["job_id"])
