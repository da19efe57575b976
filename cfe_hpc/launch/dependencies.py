"""Runs that start when others have completed: what Slurm is told of it, and what the run folders remember of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cfe_hpc.errors import UsageError
from cfe_hpc.launch.jobs import latest_attempt, latest_job, records
from cfe_hpc.ranks.dependents import move_dependents
from cfe_hpc.ranks.successor import record
from cfe_hpc.recovery.upstream import in_vain
from cfe_hpc.runfolder import RunFolder

__all__ = ["awaited", "dependency", "dependents", "keep_up", "note_dependent"]


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
    return [f"--dependency=afterok:{':'.join(map(_job_id, upstream))}", "--kill-on-invalid-dep=yes"] if upstream else []


def _job_id(folder: RunFolder) -> str:
    """What Slurm knows the run's end by: its newest job; of a sweep all its arrays, with ":" between them."""
    if folder.is_sweep:
        from cfe_hpc.launch.sweep import jobs_to_await  # late: most runs are none

        return ":".join(jobs_to_await(folder))
    job = latest_job(folder)
    if job is None or job.get("scheduler") != "slurm":
        raise UsageError(f"--after: {folder.run_id}: is no Slurm job; submit without --after")
    return str(job["job_id"])


def keep_up(upstream: Sequence[RunFolder], options: Sequence[str]) -> None:
    """Move what was just sent with `options`, as `dependency` made them, to the successors that were sent meanwhile.

    Whoever sends a successor moves the jobs that he sees waiting, after he has recorded it: one of the two sees the
    other.

    Raises:
        SchedulerError: Slurm refused.
    """
    if any(folder.is_sweep for folder in upstream):  # its tasks' successors are dealt with by those who send them
        return
    for folder, before in zip(upstream, options[0].partition(":")[2].split(":") if options else (), strict=False):
        with contextlib.suppress(UsageError):
            now = _job_id(folder)
            if now != before:
                move_dependents(before, now)


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
