"""Runs that start when others have completed: what Slurm is told of it, and what the run folders remember of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cfe_hpc.errors import SchedulerError, UsageError
from cfe_hpc.launch.jobs import all_jobs, latest_attempt, latest_job, records
from cfe_hpc.process import CommandError
from cfe_hpc.ranks.dependents import move_dependents
from cfe_hpc.ranks.successor import record
from cfe_hpc.recovery.upstream import in_vain
from cfe_hpc.runfolder import RunFolder

__all__ = ["awaited", "dependency", "dependents", "keep_up", "note_dependent", "take_along"]


def awaited(after: Iterable[RunFolder], *, by: RunFolder | None = None) -> list[RunFolder]:
    """Those of the runs that have not completed yet, each once.

    Args:
        by: the run that waits; None when it is being submitted.

    Raises:
        UsageError: one has ended otherwise, or never started: whoever waits for it would wait for ever.
    """
    waiting = {folder.path: folder for folder in after}
    for path, folder in list(waiting.items()):
        state = (folder.result() or {}).get("state")
        if state == "COMPLETED":
            del waiting[path]
            continue
        vain = in_vain(folder) if state in (None, "CANCELLED") and latest_attempt(folder) is None else None
        if state is None and vain is None:
            continue
        who, remedy = "--after", "requeue it, or submit without --after"
        if by is not None:
            who, remedy = f"{by.run_id}: waits", "requeue the one that failed, and this one follows it"
        raise UsageError(f"{who}: {folder.run_id}: {vain or f'ended {state}'}; {remedy}")
    return list(waiting.values())


def dependency(upstream: Sequence[RunFolder]) -> list[str]:
    """Options of sbatch for a job that starts when these runs, none of which has ended, have completed.

    Raises:
        UsageError: one of them is no Slurm job.
    """
    ids = [job_id for folder in upstream for job_id in _job_ids(folder)]
    return [f"--dependency=afterok:{':'.join(ids)}", "--kill-on-invalid-dep=yes"] if ids else []


def _job_ids(folder: RunFolder) -> list[str]:
    """What Slurm knows the run's end by: its newest job, and what exports its weights then; of a sweep its arrays."""
    if folder.is_sweep:
        from cfe_hpc.launch.sweep import jobs_to_await  # late: most runs are none

        return jobs_to_await(folder)
    job = latest_job(folder)
    if job is None or job.get("scheduler") != "slurm":
        raise UsageError(f"--after: {folder.run_id}: is no Slurm job; submit without --after")
    return [str(each["job_id"]) for each in (job, *records(folder, "export")[-1:])]


def keep_up(upstream: Sequence[RunFolder], options: Sequence[str]) -> None:
    """Move what was just sent with `options`, as `dependency` made them, to the successors that were sent meanwhile.

    Whoever sends a successor moves the jobs that he sees waiting, after he has recorded it: one of the two sees the
    other.

    Raises:
        SchedulerError: Slurm refused.
    """
    told = options[0].partition(":")[2].split(":") if options else []
    for folder in upstream:
        if folder.is_sweep:  # its tasks' successors are dealt with by those who send them
            continue
        *before, now = [str(job["job_id"]) for job in all_jobs(folder)]
        for job_id in set(before).intersection(told) if now not in told else ():
            take_along(job_id, now)


def take_along(before: str, now: str) -> None:
    """Let what waits for job `before` wait for `now`. Raises SchedulerError: Slurm refused, or gives no answer."""
    try:
        move_dependents(before, now)
    except CommandError as error:
        raise SchedulerError(f"{error}; what waits for job {before} may never start") from error


def note_dependent(upstream: Iterable[RunFolder], folder: RunFolder) -> None:
    """Have each of the runs remember that `folder` starts after it. One that cannot be written is passed over: it is
    somebody else's, and only `requeue` would look there."""
    for each in upstream:
        with contextlib.suppress(OSError):
            record(each, "dependent", run_dir=str(folder.path))


def dependents(folder: RunFolder) -> list[RunFolder]:
    """The runs that were submitted to start after this one, oldest first, as far as their folders are still there."""
    paths = dict.fromkeys(Path(str(each.get("run_dir"))) for each in records(folder, "dependent"))
    return [RunFolder(path) for path in paths if (path / "run.toml").is_file()]
