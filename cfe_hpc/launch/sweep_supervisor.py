"""`python -m cfe_hpc.launch.sweep_supervisor SWEEP_DIR`: runs the tasks of a sweep on this machine, so many at once.

Each task is a run like any other here, under a supervisor of its own: what ends or preempts a run does so to a task.
TERM and the other stop signals to this process are handed on to the tasks that run.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cfe_hpc import log
from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.tasks import Tasks
from cfe_hpc.errors import CfeError
from cfe_hpc.launch.jobs import latest_job
from cfe_hpc.launch.local import LocalBackend
from cfe_hpc.launch.supervisor import wait_for
from cfe_hpc.ranks.array_states import unranged
from cfe_hpc.ranks.jobrecords import unused_attempt
from cfe_hpc.ranks.sweep_task import make_task
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder

__all__ = ["main", "run_tasks"]

logger = logging.getLogger("cfe_hpc.launch.sweep_supervisor")  # __name__ is "__main__" when it runs

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_WAITED_FOR = (*_STOP, signal.SIGCHLD)
_LOOK_S = 60.0


def run_tasks(sweep: RunFolder, spec: RunSpec, numbers: Iterable[int], *, at_once: int) -> None:
    """Run the tasks that have no result yet, in order; returns when the last of them has ended. Stop signals must be
    blocked, and no other child of this process run."""
    todo = [number for number in numbers if sweep.task(number).result() is None]
    running: dict[int, RunFolder] = {}
    while running or todo:
        while todo and len(running) < at_once:
            number = todo.pop(0)
            task = None if sweep.task(number).is_cancelled else _start(sweep, spec, number)
            if task is not None:
                running[int((latest_job(task) or {})["pid"])] = task
        if running:
            _wait(running)


def _start(sweep: RunFolder, spec: RunSpec, number: int) -> RunFolder | None:
    """Start a task's own supervisor; None, and a result that says why, where that cannot be."""
    task = sweep.task(number)
    try:
        make_task(sweep, number)
        backend, own = LocalBackend(), RunSpec.read(task.run_toml)
        if latest_job(task) is None:
            job_id = backend.submit(own, task)
        else:
            job_id = backend.resubmit(own, task, next_attempt=unused_attempt(task))
    except CfeError as error:
        logger.error("task %d: %s", number, error)
        write_result(task, "FAILED", attempts=0, reason=str(error))
        return None
    logger.info("task %d: %s", number, job_id)
    return task


def _wait(running: dict[int, RunFolder]) -> None:
    """Until a task has ended or a stop signal came, which is handed on."""
    came = signal.sigtimedwait(_WAITED_FOR, _LOOK_S)
    if came is not None and came.si_signo in _STOP:
        for pid in running:
            os.kill(pid, came.si_signo)  # ours until reaped: no other process can have the number
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        task = running.pop(pid, None)
        if task is not None:
            state = (task.result() or {}).get("state")
            logger.info("%s: %s", task.run_id, state or f"no result (status {os.waitstatus_to_exitcode(status)})")


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    parser = argparse.ArgumentParser(prog="cfe_hpc.launch.sweep_supervisor", description="Run a sweep on this machine.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--after", type=Path, metavar="RUN_DIR", action="append", default=[], help="wait for that run")
    args = parser.parse_args(argv)
    log.configure()
    sweep = RunFolder(args.run_dir)
    spec = RunSpec.read(sweep.run_toml)
    for path in args.after:
        why_not = wait_for(RunFolder(path), sweep, spec.site.slurm.poll_interval)
        if why_not is not None:
            sweep.note_event("cancelled", attempt=None, reason=why_not)
            write_result(sweep, "CANCELLED", attempts=0, reason=why_not)
            return 1
    number = Tasks.read(sweep.sweep_json).tasks
    numbers = unranged(os.environ["CFE_SWEEP_TASKS"]) if os.environ.get("CFE_SWEEP_TASKS") else range(number)
    assert spec.job.sweep is not None
    run_tasks(sweep, spec, numbers, at_once=spec.job.sweep.max_parallel or 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
