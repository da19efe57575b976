"""`python -m cfe_hpc.ranks.sweep_task`: what the script of an array does before srun: it makes its task's run folder,
unless an earlier attempt has, and prints the number that this job's first attempt has there."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.sweep_rules import task_job
from cfe_hpc.config.tasks import Tasks
from cfe_hpc.errors import CfeError, UsageError
from cfe_hpc.ranks.env import slurm_job_id
from cfe_hpc.ranks.successor import record_job, records, unused_attempt
from cfe_hpc.runfolder import RunFolder

__all__ = ["begin", "main", "make_task"]


def make_task(sweep: RunFolder, number: int) -> RunFolder:
    """The folder of a task, as `RunFolder.create` and `submit` leave that of a run, but for its script and jobs.

    One process at a time may call this for a task. What is there already stays.

    Raises:
        ConfigError: the sweep's own files are missing or altered.
        OSError: the folder cannot be written.
    """
    task = sweep.task(number)
    if task.run_toml.exists():
        return task
    spec = RunSpec.read(sweep.run_toml)
    tasks = Tasks.read(sweep.sweep_json)
    for folder in (task.logs, task.checkpoints, task.control):
        folder.mkdir(parents=True, exist_ok=True)
    swept = {f"job.{axis.key}": f"sweep, task {number}" for axis in tasks.axes}
    origins = {key: origin for key, origin in spec.origins.items() if not key.startswith("job.sweep")} | swept
    job = task_job(spec.job, tasks, number)
    submitted: dict[str, Any] = next(sweep.events(), {})
    task.append_event(
        "submitted", attempt=None, **{key: submitted[key] for key in ("time", "detail") if key in submitted}
    )
    # Last: a folder that has it is whole.
    spec.model_copy(update={"run_id": task.run_id, "job": job, "after": [], "origins": origins}).write(task.run_toml)
    return task


def begin(sweep: RunFolder, number: int, job_id: str, *, attempt_base: int | None = None) -> int:
    """Make the task's folder ready for a job of its own; the number of that job's first attempt.

    Args:
        attempt_base: that number where the job's sender has told it, who then records the job, too.

    Raises:
        UsageError: the sweep, or the task, was cancelled.
        ConfigError, OSError: as `make_task`.
    """
    if sweep.task(number).is_cancelled:
        raise UsageError(f"{sweep.task(number).run_id}: was cancelled: no attempt begins")
    task = make_task(sweep, number)
    for source, link in ((sweep.submission_script, task.submission_script), (sweep.starter, task.starter)):
        with contextlib.suppress(FileExistsError):
            os.link(source, link)
    if attempt_base is not None:
        return attempt_base
    for known in records(task, "job"):
        if known.get("job_id") == job_id:
            return int(known["attempt_base"])
    base = unused_attempt(task)
    record_job(task, job_id=job_id, scheduler="slurm", attempt_base=base)
    return base


def main() -> int:
    """The module's command line: all it needs stands in the environment."""
    environ = os.environ
    sweep, number = RunFolder(Path(environ["CFE_SWEEP_DIR"])), int(environ["CFE_SWEEP_TASK"])
    told = environ.get("CFE_ATTEMPT_BASE")
    try:
        base = begin(sweep, number, slurm_job_id(environ), attempt_base=int(told) if told else None)
    except (CfeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
