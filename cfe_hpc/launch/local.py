"""This machine as a site: the job script starts a supervisor of our own, which outlives the terminal."""

from __future__ import annotations

import os
import shlex
import signal
import socket
from collections.abc import Sequence
from typing import Any

from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.tasks import Tasks
from cfe_hpc.errors import SchedulerError
from cfe_hpc.files import write_atomic
from cfe_hpc.launch.dependencies import awaited, note_dependent
from cfe_hpc.launch.preparation import verification_inside
from cfe_hpc.launch.script import prologue
from cfe_hpc.launch.states import JobState
from cfe_hpc.process import start_ticks
from cfe_hpc.ranks.array_states import ranges
from cfe_hpc.ranks.successor import clean_environment, record_job
from cfe_hpc.runfolder import RunFolder

__all__ = ["LocalBackend", "is_alive", "start_ticks"]

# The supervisor takes these by waiting for them; one that comes while it is being started must wait too.
_HELD_BACK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class LocalBackend:
    """`Backend` without a scheduler. See launch.backend.Backend for the contracts.

    Args:
        rank_command: what a rank is; the package's own bootstrap with the run folder when empty.
    """

    def __init__(self, rank_command: Sequence[str] = ()) -> None:
        self._rank_command = rank_command

    def preview(self, spec: RunSpec, folder: RunFolder) -> str:
        return self._script(spec, folder)

    def submit(self, spec: RunSpec, folder: RunFolder, *, after: Sequence[RunFolder] = ()) -> str:
        awaited(after)
        write_atomic(folder.submission_script, self._script(spec, folder, after))
        if spec.job.sweep is None:
            job_id = _start(folder, attempt_base=0)
        else:
            [job_id] = self.submit_tasks(spec, folder, range(Tasks.read(folder.sweep_json).tasks))
        note_dependent(after, folder)
        return job_id

    def resubmit(self, spec: RunSpec, folder: RunFolder, *, next_attempt: int, after: Sequence[RunFolder] = ()) -> str:
        # The script itself says what it waits for.
        return _start(folder, attempt_base=next_attempt)

    def submit_tasks(
        self, spec: RunSpec, sweep: RunFolder, tasks: Sequence[int], *, after: Sequence[RunFolder] = ()
    ) -> list[str]:
        return [_start(sweep, attempt_base=0, tasks=ranges(tasks))]

    def states(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobState]:
        known = {}
        for job in jobs:
            job_id = str(job["job_id"])
            if job.get("host") != socket.gethostname():
                reason = f"runs on {job.get('host')}: ask there"
                known[job_id] = JobState(job_id=job_id, state="UNKNOWN", word="ELSEWHERE", reason=reason)
            elif is_alive(job):
                known[job_id] = JobState(job_id=job_id, state="RUNNING", word="RUNNING", nodes=str(job["host"]))
        return known

    def cancel(self, job: dict[str, Any]) -> None:
        _signal(job, signal.SIGTERM)

    def request_save(self, job: dict[str, Any], spec: RunSpec) -> None:
        _signal(job, signal.SIGUSR2)

    def release(self, job: dict[str, Any]) -> None:
        raise AssertionError("nothing is ever held in a queue here")

    def _script(self, spec: RunSpec, folder: RunFolder, after: Sequence[RunFolder] = ()) -> str:
        python = shlex.quote(spec.provenance.python)
        module = "supervisor" if spec.job.sweep is None else "sweep_supervisor"
        supervisor = [spec.provenance.batch_python, "-m", f"cfe_hpc.launch.{module}", str(folder.path)]
        supervisor += [f"--after={each.path}" for each in after]
        supervisor += ["--", *self._rank_command] if self._rank_command else []
        words = shlex.join(supervisor)
        if spec.job.environment.container.kind != "none" and spec.job.sweep is None:
            from cfe_hpc.launch.container import contained  # late: few jobs have one

            words += f" -- {contained(spec, folder, f'{python} -u -m cfe_hpc.ranks {shlex.quote(str(folder.path))}')}"
        return "\n".join(
            [
                "#!/bin/bash",
                *prologue(spec, folder),
                *verification_inside(spec, folder),
                f"cd -- {shlex.quote(spec.provenance.start_folder)} || exit 1",
                f"exec {words}",
                "",
            ]
        )


def _start(folder: RunFolder, *, attempt_base: int, tasks: str | None = None) -> str:
    """Run the folder's script in a session of its own, so that neither this process nor the terminal takes it along;
    record it as a job.

    Args:
        tasks: of a sweep those to run.
    """
    environment = clean_environment(os.environ) | {"CFE_ATTEMPT_BASE": str(attempt_base)}
    of_sweep = {} if tasks is None else {"tasks": tasks}
    if tasks is not None:
        environment["CFE_SWEEP_TASKS"] = tasks
    log = str(folder.logs / "supervisor.log")
    try:
        pid = os.posix_spawn(
            "/bin/bash",
            ["bash", str(folder.submission_script)],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigmask=_HELD_BACK,
        )
    except OSError as error:
        raise SchedulerError(f"/bin/bash: cannot be started ({error.strerror}); see {log}") from error
    job_id = f"local-{pid}"
    facts = {"job_id": job_id, "pid": pid, "start_ticks": start_ticks(pid), "host": socket.gethostname()}
    record_job(folder, scheduler="local", attempt_base=attempt_base, **facts, **of_sweep)
    return job_id


def is_alive(job: dict[str, Any]) -> bool:
    """Whether the supervisor of a local job's record runs: the same process, not another that got its number."""
    return job.get("start_ticks") is not None and start_ticks(job["pid"]) == job["start_ticks"]


def _signal(job: dict[str, Any], signum: signal.Signals) -> None:
    """Signal the job's supervisor; nothing happens when it has ended."""
    if job.get("host") != socket.gethostname():
        raise SchedulerError(f"{job['job_id']}: runs on {job.get('host')}; give the command there")
    try:
        pidfd = os.pidfd_open(job["pid"])
    except ProcessLookupError:
        return
    try:
        if is_alive(job):
            signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
