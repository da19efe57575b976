"""`python -m cfe_hpc.launch.supervisor RUN_DIR`: plays the scheduler for a run on this machine.

It starts the ranks of an attempt, keeps its time limit, and after it starts the next one or writes the end. TERM to
it is a preemption, or with control/cancel the end for good; USR2 asks the ranks to save. Signals are never handled:
they are blocked and waited for, so that nothing happens in between.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cfe_hpc import log
from cfe_hpc.config.run import RunSpec
from cfe_hpc.launch.exporting import export_command
from cfe_hpc.launch.jobs import latest_job
from cfe_hpc.launch.local import is_alive
from cfe_hpc.launch.localranks import LocalRanks, adopt_orphans
from cfe_hpc.ranks.epilogue import close_failed_attempt, note_end
from cfe_hpc.recovery.attempts import KILLED
from cfe_hpc.recovery.evidence import oom_kills
from cfe_hpc.recovery.result import close_books, write_result
from cfe_hpc.runfolder import RunFolder

__all__ = ["Attempt", "main", "supervise", "wait_for"]

logger = logging.getLogger("cfe_hpc.launch.supervisor")  # __name__ is "__main__" when it runs

StopReason = Literal["preempted", "time_limit", "cancelled", "requeue_requested", "failed"]

_WAITED_FOR = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
_FOREVER_S = 86_400.0


class Attempt:
    """One attempt: its ranks and its clock. Making one starts the ranks."""

    def __init__(self, folder: RunFolder, spec: RunSpec, number: int, rank_command: Sequence[str]) -> None:
        self._folder, self._spec, self.number = folder, spec, number
        plan = spec.plan
        now_s = time.monotonic()
        self._limit_at_s = now_s + (_FOREVER_S * 365 if plan.time_s is None else plan.time_s)
        self._warn_at_s = self._limit_at_s - plan.signal_lead_s
        self._kill_at_s = float("inf")
        self._told_to_end = False
        self.stop_reason: StopReason | None = None
        self.failure: tuple[int, int] | None = None
        """(rank, status) of the one that failed first: those ended because of it do not count."""
        self.oom_kills = 0
        self.by_launcher = plan.launcher != "srun"
        self.ranks = LocalRanks(
            folder,
            plan,
            attempt=number,
            job_id=f"local-{os.getpid()}",
            argv=rank_command,
            cwd=Path(spec.provenance.start_folder),
        )

    @property
    def status(self) -> int:
        """0, the status of the rank that failed first, or the signal that killed it."""
        return abs(self.failure[1]) if self.failure else 0

    def run(self) -> None:
        """Return when every rank has ended, and whatever they left behind is gone."""
        while self.ranks.alive():
            self.failure = self.failure or self.ranks.failure()
            if self.stop_reason is None and self.failure is not None:
                self._end("failed", self._spec.site.slurm.kill_wait)
            self._keep_time()
            next_s = min(self._warn_at_s, self._limit_at_s, self._kill_at_s) - time.monotonic()
            came = signal.sigtimedwait(_WAITED_FOR, max(0.0, min(next_s, _FOREVER_S)))
            if came is not None:
                self._hear(signal.Signals(came.si_signo))
        self.failure = self.failure or self.ranks.failure()
        self.ranks.sweep()

    def _keep_time(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._kill_at_s:
            logger.warning("attempt %d: the ranks did not end in time: killed", self.number)
            self.ranks.send(signal.SIGKILL)
            self._kill_at_s = float("inf")
        if now_s >= self._warn_at_s:
            self._warn_at_s = float("inf")
            self._note("time_limit")
            self.ranks.send(signal.Signals[f"SIG{self._spec.plan.signal}"])
        if now_s >= self._limit_at_s:
            self._limit_at_s = float("inf")
            self._end("time_limit", self._spec.site.slurm.kill_wait)

    def _hear(self, signum: signal.Signals) -> None:
        logger.info("attempt %d: %s", self.number, signum.name)
        if signum in (signal.SIGTERM, signal.SIGINT):
            kill_wait_s = self._spec.site.slurm.kill_wait
            if self._folder.promised("cancel") is not None:
                self._end("cancelled", kill_wait_s)
            else:
                self._end("preempted", self._spec.plan.preemption.grace or kill_wait_s)
        elif signum in (signal.SIGUSR1, signal.SIGUSR2):
            if self.stop_reason is None:
                self.stop_reason = "requeue_requested"
            self.ranks.send(signum)

    def _note(self, reason: StopReason) -> None:
        """Write the reason where the ranks look for it, before they are signalled. The first one stands."""
        self.stop_reason = self.stop_reason or reason
        # Without it the ranks do not know why; what follows when they are killed goes by stop_reason.
        self._folder.note(f"stop-{self.number}", f"attempt {self.number} is stopped: {reason}", reason=reason)

    def _end(self, reason: StopReason, grace_s: float) -> None:
        """TERM now, once however often it is asked for; KILL after the grace."""
        if self._told_to_end:
            return
        self._told_to_end = True
        logger.info("attempt %d: %s: the ranks have %g s to end", self.number, reason, grace_s)
        self._note(reason)
        self.ranks.send(signal.SIGTERM)
        self._kill_at_s = time.monotonic() + grace_s


def supervise(folder: RunFolder, spec: RunSpec, *, first_attempt: int, rank_command: Sequence[str]) -> int:
    """Run attempts until the run has ended or is held; 0 when it completed, else 1. Writes what only this process
    can know: how ranks ended that could not say so themselves."""
    number = first_attempt
    while True:
        killed_before = oom_kills() or 0
        attempt = Attempt(folder, spec, number, rank_command)
        attempt.run()
        attempt.oom_kills = (oom_kills() or 0) - killed_before
        note_end(folder, attempt=number, status=attempt.status, job_id=f"local-{os.getpid()}")
        if not _another_follows(folder, attempt):
            break
        number += 1
    result = folder.result() or {}
    logger.info("ended: %s", result.get("state"))
    return 0 if result.get("state") == "COMPLETED" else 1


def _another_follows(folder: RunFolder, attempt: Attempt) -> bool:
    """Decide what comes after an attempt, whose ranks may have ended in any way."""
    number = attempt.number
    if folder.result() is not None:
        close_books(folder)
        return False
    if folder.promised("cancel") is not None:
        _write_end(folder, "CANCELLED", attempt=number, reason="cancelled by the user")
        return False
    if folder.promised(f"requeued-{number}") is not None:
        return True
    held = folder.promised("held")
    if held is not None:
        _write_end(folder, "HELD", attempt=number, reason=str(held.get("reason", "")))
        return False
    if attempt.stop_reason == "preempted":
        # It goes back to the queue though it could not save, as Slurm has it.
        return close_failed_attempt(folder, attempt=number, status=0, cause="preempted")
    _note_failure(folder, attempt)
    return close_failed_attempt(folder, attempt=number, status=attempt.status, oom_kills=attempt.oom_kills)


def _note_failure(folder: RunFolder, attempt: Attempt) -> None:
    """Write the `failed` event of an attempt, unless a rank has done so; of a rank that was killed, unless it has: the
    others report that it is gone."""
    said = [event for event in folder.events() if event["event"] == "failed" and event.get("attempt") == attempt.number]
    rank, status = attempt.failure or (None, 0)
    killed = status < 0 and attempt.stop_reason != "time_limit" and not attempt.by_launcher
    if said and not (killed and all(event.get("rank") != rank for event in said)):
        return
    if attempt.stop_reason == "time_limit":
        folder.note_event("failed", attempt=attempt.number, reason="the time limit came before the ranks had saved")
    elif attempt.failure is None:
        folder.note_event("failed", attempt=attempt.number, reason="the ranks ended without a result")
    elif not attempt.by_launcher:  # it is an agent's end then, and not a rank's
        how = f"was killed by {signal.Signals(-status).name}" if killed else f"exited with status {status}"
        detail = KILLED if killed else None
        folder.note_event("failed", attempt=attempt.number, rank=rank, reason=f"rank {rank} {how}", detail=detail)


def _write_end(folder: RunFolder, state: Literal["CANCELLED", "HELD"], *, attempt: int, reason: str) -> None:
    """The end of a run whose ranks could not write it. Who holds a run writes that event."""
    if state == "CANCELLED" and not any(event["event"] == "cancelled" for event in folder.events()):
        folder.note_event("cancelled", attempt=attempt, reason=reason)
    write_result(folder, state, attempts=attempt + 1, reason=reason)


def wait_for(after: RunFolder, folder: RunFolder, poll_s: float) -> str | None:
    """Wait until the run `after` has completed, its exports included; why this one cannot start, or None when it can.

    Returns at once when this one is cancelled.
    """
    while folder.promised("cancel") is None:
        state = (after.result() or {}).get("state")
        if state not in (None, "COMPLETED"):
            return f"never started: {after.run_id}, which it waits for, ended {state}"
        if state == "COMPLETED" and not is_alive(latest_job(after) or {}):  # else its supervisor exports weights
            return None
        signal.sigtimedwait(_WAITED_FOR, poll_s)
    return "cancelled by the user"


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    parser = argparse.ArgumentParser(prog="cfe_hpc.launch.supervisor", description="Run a run folder on this machine.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--after", type=Path, action="append", default=[], metavar="RUN_DIR", help="start when that run has completed"
    )
    parser.add_argument("rank_command", nargs="*", help="what a rank runs (after --); the package's own when left out")
    args = parser.parse_args(argv)
    log.configure()
    adopt_orphans()
    folder = RunFolder(args.run_dir)
    spec = RunSpec.read(folder.run_toml)
    for after in args.after:
        why_not = wait_for(RunFolder(after), folder, spec.site.slurm.poll_interval)
        if why_not is not None:
            _write_end(folder, "CANCELLED", attempt=-1, reason=why_not)
            return 1
    command = args.rank_command or [spec.provenance.python, "-u", "-m", "cfe_hpc.ranks", str(folder.path)]
    first_attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0"))
    code = supervise(folder, spec, first_attempt=first_attempt, rank_command=command)
    export = export_command(spec, folder)
    if code == 0 and export is not None:
        subprocess.run(export, check=False)  # it says in the log what went wrong: the run itself is complete
    return code


if __name__ == "__main__":
    sys.exit(main())
