"""`command` jobs: the wrapper that starts the user's program as a rank, hands signals on, and has the run requeued.

The wrapper is what the scheduler signals on sites that signal only the step's direct children. It forwards each
signal once: to the process that has joined the run, or, as long as none has, to the program. A program that joins
does the rest itself (save, agreement, requeue): the wrapper then finds the promise of a requeue in the run folder and
makes no second one. A program that never heard of cfe_hpc is requeued when it ends after a stop signal, whatever its
exit status.

Each rank's wrapper leaves a note of how its program ended; rank 0's reads them and decides for all. A signal alone
does not make a stop: srun sends TERM to the other ranks when one has failed.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from threading import Thread
from typing import Any

from cfe_hpc import log
from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.template import fill_in
from cfe_hpc.devices.resolve import resolve
from cfe_hpc.ranks.bootstrap import rank_environment
from cfe_hpc.ranks.child import Child
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.rendezvous import meet
from cfe_hpc.ranks.scheduler import choose
from cfe_hpc.ranks.stopping import Inquiry, conclude
from cfe_hpc.recovery import fencing
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder

__all__ = ["command_words", "decided", "exit_code", "program_environment", "run_command", "see_through"]

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_SLOWEST_POLL_S = 5.0
_FENCE_S = 5.0
_SIGNAL_SKEW_S = 2.0
"""A stop reaches the nodes one after the other: a program that fails may have missed a peer that was told first."""


def run_command(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> int:
    """Run the job's command as this rank, to its end. Every rank calls it.

    Returns:
        The status to exit with: the program's own, or 0 when it ended because of a stop and another attempt follows.
    """
    log.configure(rank=facts.rank)
    return see_through(folder, spec, facts, command_words(spec), program_environment(folder, spec, facts))


def command_words(spec: RunSpec) -> list[str]:
    """The job's command, its [params] filled in."""
    assert spec.job.command is not None
    return [fill_in(word, spec.job.params) for word in spec.job.command]


def program_environment(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> dict[str, str]:
    """The whole environment of this rank's program. Collective: the ranks meet, at ports that this process keeps."""
    environment = {
        **os.environ,
        **rank_environment(facts, meet(facts, token=spec.run_id), spec),
        "CFE_RUN_DIR": str(folder.path),
    }
    environment.update(resolve(spec.plan.accelerator).device.environment(facts))
    return environment


def see_through(
    folder: RunFolder, spec: RunSpec, facts: RankFacts, argv: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Run `argv`, this task's part of the job's command, to its end. Every task of the step calls it: a rank's
    wrapper, or the agent of a launcher that starts a node's ranks.

    Returns:
        The status to exit with, as `run_command` has it.
    """
    if facts.rank == 0:
        folder.reopen()
        fencing.begin(folder, facts.attempt)
        ranks = facts.world_size * (1 if spec.plan.launcher == "srun" else spec.plan.devices_per_node)
        detail = {"job_id": facts.job_id, "world_size": ranks, "hosts": list(facts.hosts), "argv": spec.job.command}
        folder.note_event("started", attempt=facts.attempt, host=facts.hosts[0], detail=detail)
    try:
        child = Child(argv, environment, launcher=spec.plan.launcher != "srun")
    except OSError as error:
        folder.note_event("failed", attempt=facts.attempt, rank=facts.rank, reason=f"{argv[0]}: {error.strerror}")
        logger.error("%s: cannot be started: %s", argv[0], error.strerror)
        return 127
    if facts.local_rank == 0:
        Thread(target=_leave_to_successor, args=(folder, facts.attempt, child), name="cfe-fence", daemon=True).start()
    if facts.rank == 0:
        return _Leader(folder, spec, facts, child).attend()
    while (status := child.poll()) is None:
        time.sleep(_POLL_S)
    return _leave(folder, spec, facts, child, status)


def _leave_to_successor(folder: RunFolder, attempt: int, child: Child) -> None:
    """End this task and its program once a later attempt has begun: Slurm has given this one up, and its node did not
    hear. What else the step runs here is then slurmstepd's to end."""
    while (newest := fencing.superseded(folder, attempt)) is None:
        time.sleep(_FENCE_S)
    logger.error("attempt %d has begun: attempt %d ends here", newest, attempt)
    child.kill()
    os._exit(1)


def exit_code(status: int) -> int:
    """A status as subprocess tells it, by the shell's convention: 128 + the signal that ended the program."""
    return 128 - status if status < 0 else status


def _leave(folder: RunFolder, spec: RunSpec, facts: RankFacts, child: Child, status: int) -> int:
    """Note how this task's program ended; the status to exit with."""
    if status and not child.seen:
        time.sleep(_SIGNAL_SKEW_S)
    name, meaning = f"exit-{facts.attempt}.{facts.rank}", f"rank {facts.rank} has ended with status {status}"
    folder.note(name, meaning, rank=facts.rank, status=status, signals=child.seen)
    if child.seen:
        return 0
    if status and not decided(folder, facts.attempt):
        reason = f"exit status {exit_code(status)}"
        who: dict[str, Any] = {"rank": facts.rank}
        if spec.plan.launcher != "srun":
            reason, who = f"{spec.plan.launcher}: {reason}", {"host": facts.hosts[facts.node_rank]}
        folder.note_event("failed", attempt=facts.attempt, reason=reason, **who)
    return exit_code(status)


def decided(folder: RunFolder, attempt: int) -> bool:
    """Whether a rank that joined has said what becomes of the run."""
    return bool(folder.result() or folder.promised(f"requeued-{attempt}") or folder.promised("held"))


class _Leader:
    """Rank 0's wrapper: waits for its own program and for word of the others', and says what becomes of the run."""

    def __init__(self, folder: RunFolder, spec: RunSpec, facts: RankFacts, child: Child) -> None:
        self._folder, self._spec, self._facts, self._child = folder, spec, facts, child
        self._scheduler = choose(folder, facts, spec.plan)
        self._inquiry: Inquiry | None = None

    def attend(self) -> int:
        """Wait for the end; the status to exit with."""
        while (status := self._child.poll()) is None and not self._must_act():
            time.sleep(_POLL_S)
        if status is None:
            code = 0 if decided(self._folder, self._facts.attempt) else self._settle(self._ends())
            while self._child.poll() is None:  # it has until the kill
                time.sleep(_POLL_S)
            return code
        code = _leave(self._folder, self._spec, self._facts, self._child, status)
        # A failure ends the other ranks only once this one is gone; the batch script takes it from there.
        if decided(self._folder, self._facts.attempt) or (code and not self._child.seen):
            return exit_code(status)
        return self._settle(self._wait_for_ranks())

    def _must_act(self) -> bool:
        """Whether the run is lost unless something is done while the program still runs: a partition that cancels
        requeues nothing at the kill."""
        late = self._out_of_time() and self._spec.plan.preemption.mode == "cancel"
        return late and self._inquiry is not None and self._inquiry.answer()[0] == "preempted"

    def _out_of_time(self) -> bool:
        """Whether a stop leaves no more time to wait in. Asks why it came as soon as it has come."""
        if not self._child.seen:
            return False
        if self._inquiry is None:
            self._folder.note_event("signal", attempt=self._facts.attempt, reason="+".join(self._child.seen))
            self._inquiry = Inquiry(self._scheduler, self._child.seen, self._spec)
        if not self._inquiry.answered or self._child.first_s is None:
            return False
        plan, kill_wait_s = self._spec.plan, self._spec.site.slurm.kill_wait
        if self._inquiry.answer()[0] == "preempted":
            # A successor must be on its way before the kill.
            left_s = (plan.preemption.grace or kill_wait_s) * (0.6 if plan.preemption.mode == "cancel" else 1.0)
        else:
            left_s = max(plan.signal_lead_s, kill_wait_s)
        return time.monotonic() > self._child.first_s + left_s

    def _wait_for_ranks(self) -> list[dict[str, Any]]:
        """The notes of all ranks; those that there are when a stop leaves no more time."""
        pause_s = _POLL_S
        while len(ends := self._ends()) < self._facts.world_size and not self._out_of_time():
            time.sleep(pause_s)
            pause_s = _POLL_S if self._child.seen else min(_SLOWEST_POLL_S, pause_s * 1.5)
        return ends

    def _ends(self) -> list[dict[str, Any]]:
        # By listing: NFS clients go on believing for a minute that a name they asked for is not there.
        names = self._folder.control.glob(f"exit-{self._facts.attempt}.*")
        return [json.loads(path.read_text(encoding="utf-8")) for path in names]

    def _settle(self, ends: list[dict[str, Any]]) -> int:
        failed = next((end for end in ends if end["status"] and not end["signals"]), None) or self._vanished(ends)
        signals = sorted({name for end in ends for name in end["signals"]} | set(self._child.seen))
        if signals:
            inquiry = self._inquiry or Inquiry(self._scheduler, signals, self._spec)
            by_hand = inquiry.answer()[0] == "requeue_requested" and not self._requeue_asked()
            if failed is None or not by_hand:
                return self._stop(inquiry)
        if failed is not None:
            return exit_code(int(failed["status"]))
        self._folder.note_event("completed", attempt=self._facts.attempt)
        write_result(self._folder, "COMPLETED", attempts=self._facts.attempt + 1)
        return 0

    def _vanished(self, ends: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What to take for the note of a rank that is gone, wrapper and all, without having left one."""
        silent = sorted(set(range(self._facts.world_size)) - {end["rank"] for end in ends} - {0})
        if not silent:
            return None
        logger.warning("rank %d has left no word of how its program ended", silent[0])
        return {"rank": silent[0], "status": 1}

    def _requeue_asked(self) -> bool:
        return self._folder.promised(f"requeue-{self._facts.attempt}") is not None

    def _stop(self, inquiry: Inquiry) -> int:
        verdict = conclude(
            self._folder,
            self._scheduler,
            self._spec,
            SoloGroup(),
            inquiry=inquiry,
            attempt=self._facts.attempt,
            step=None,
            started_s=self._child.first_s,
        )
        if verdict.action == "cancelled":
            write_result(self._folder, "CANCELLED", attempts=self._facts.attempt + 1, reason=verdict.why)
        elif verdict.action == "held":
            write_result(self._folder, "HELD", attempts=self._facts.attempt + 1, reason=verdict.why)
        return verdict.exit_code
