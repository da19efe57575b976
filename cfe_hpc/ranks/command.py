"""`command` jobs: the wrapper that starts the user's program as a rank, hands signals on, and has the run requeued.

The wrapper is what the scheduler signals on sites that signal only the step's direct children. It forwards each
signal once. A program that joins the run does the rest itself (save, agreement, requeue): the wrapper then finds the
promise of a requeue in the run folder and makes no second one. A program that never heard of cfe_hpc is requeued
when it ends after a stop signal, whatever its exit status.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from types import FrameType

from cfe_hpc import log
from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.template import fill_in
from cfe_hpc.devices.resolve import resolve
from cfe_hpc.ranks.bootstrap import rank_environment
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.rendezvous import meet
from cfe_hpc.ranks.scheduler import choose
from cfe_hpc.ranks.signals import STOP_SIGNALS, unblock
from cfe_hpc.ranks.stopping import Inquiry, conclude
from cfe_hpc.recovery import ledger
from cfe_hpc.runfolder import RunFolder

__all__ = ["run_command"]

logger = logging.getLogger(__name__)

_POLL_S = 0.1


class _Child:
    """The user's program, and the signals that came for it."""

    def __init__(self, argv: list[str], environment: Mapping[str, str]) -> None:
        self.seen: list[str] = []
        self.first_s: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)
        # Blocked while the child is made: a signal between fork and the line below would be lost on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(argv, env=dict(environment), preexec_fn=unblock)
        finally:
            unblock()

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if self.first_s is None:
            self.first_s = time.monotonic()
        if name in self.seen or self._process is None:
            return
        self.seen.append(name)
        self._process.send_signal(signum)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait()


def run_command(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> int:
    """Run the job's command as this rank, to its end. Every rank calls it.

    Returns:
        The status to exit with: the program's own, or 0 when it ended because of a stop and another attempt follows.
    """
    log.configure(rank=facts.rank)
    assert spec.job.command is not None
    argv = [fill_in(word, spec.job.params) for word in spec.job.command]
    environment = {
        **os.environ,
        **rank_environment(facts, meet(facts, token=spec.run_id), spec),
        "CFE_RUN_DIR": str(folder.path),
    }
    environment.update(resolve(spec.plan.accelerator).device.environment(facts))
    if facts.rank == 0:
        folder.reopen()
        detail = {"job_id": facts.job_id, "world_size": facts.world_size, "hosts": list(facts.hosts), "argv": argv}
        folder.append_event("started", attempt=facts.attempt, host=facts.hosts[0], detail=detail)
    try:
        child = _Child(argv, environment)
    except OSError as error:
        folder.append_event("failed", attempt=facts.attempt, rank=facts.rank, reason=f"{argv[0]}: {error.strerror}")
        logger.error("%s: cannot be started: %s", argv[0], error.strerror)
        return 127
    status = child.wait()
    _leave_mark(folder, facts, status)
    if facts.rank == 0:
        _wait_for_ranks(folder, spec, facts)
        return _settle(folder, spec, facts, child, status)
    return 0 if child.seen else _exit_code(status)


def _exit_code(status: int) -> int:
    """The shell's convention: 128 + the signal that ended the program."""
    return 128 - status if status < 0 else status


def _leave_mark(folder: RunFolder, facts: RankFacts, status: int) -> None:
    folder.promise(f"exit-{facts.attempt}.{facts.rank}", status=status, rank=facts.rank)


def _wait_for_ranks(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> None:
    """Wait until every rank's program has ended, within the grace: after a requeue the rest are killed."""
    deadline_s = time.monotonic() + max(5.0, spec.plan.preemption.grace)
    missing = set(range(facts.world_size))
    while missing and time.monotonic() < deadline_s:
        missing = {rank for rank in missing if folder.promised(f"exit-{facts.attempt}.{rank}") is None}
        if missing:
            time.sleep(_POLL_S)


def _settle(folder: RunFolder, spec: RunSpec, facts: RankFacts, child: _Child, status: int) -> int:
    """What becomes of the run: rank 0's wrapper decides, unless the program joined and has decided already."""
    result = folder.result()
    if result is not None or folder.promised(f"requeued-{facts.attempt}") or folder.promised("held"):
        return 0 if child.seen or (result or {}).get("state") == "COMPLETED" else _exit_code(status)
    if child.seen:
        scheduler = choose(folder, facts, spec.plan)
        folder.append_event("signal", attempt=facts.attempt, reason="+".join(child.seen))
        verdict = conclude(
            folder,
            scheduler,
            spec.job.recovery,
            SoloGroup(),
            inquiry=Inquiry(scheduler, child.seen),
            attempt=facts.attempt,
            step=None,
            started_s=child.first_s,
        )
        if verdict.action == "cancelled":
            _write_result(folder, facts, "CANCELLED")
        if verdict.action == "killed":
            time.sleep(spec.plan.preemption.grace + spec.site.slurm.kill_wait + 60.0)
        return verdict.exit_code
    if status == 0:
        folder.append_event("completed", attempt=facts.attempt)
        _write_result(folder, facts, "COMPLETED")
        return 0
    folder.append_event("failed", attempt=facts.attempt, rank=0, reason=f"exit status {_exit_code(status)}")
    return _exit_code(status)


def _write_result(folder: RunFolder, facts: RankFacts, state: str) -> None:
    """A program that did not join counts no steps: the figures that need them are absent, not invented."""
    summary = ledger.summarise(folder)
    folder.write_result(
        {
            "state": state,
            "final_step": None,
            "attempts": facts.attempt + 1,
            "lost_steps": None,
            "goodput": None,
            "wall_seconds": summary.wall_seconds,
            "weights_sha256": None,
            "metrics": {},
        }
    )
