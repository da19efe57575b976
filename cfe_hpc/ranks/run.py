"""`Run`: what a training script sees of cfe_hpc. It resumes, logs, saves, stops and is requeued; the script trains."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CorruptCheckpoint
from cfe_hpc.metrics.exporter import build as build_exporter
from cfe_hpc.ranks import loading, signals, timer
from cfe_hpc.ranks.agreement import Agreement
from cfe_hpc.ranks.alone import alone_folder, next_attempt
from cfe_hpc.ranks.bootstrap import Place, bootstrap
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.finite import Finite
from cfe_hpc.ranks.journal import Journal
from cfe_hpc.ranks.keeper import Keeper
from cfe_hpc.ranks.phases import Phase
from cfe_hpc.ranks.preflight import Preflight, require
from cfe_hpc.ranks.rollback import RollBacks, Spent
from cfe_hpc.ranks.scheduler import choose
from cfe_hpc.ranks.stopping import Ended, Inquiry, Verdict, conclude
from cfe_hpc.ranks.watchdog import Watchdog
from cfe_hpc.recovery.causes import of_exception
from cfe_hpc.recovery.result import add_metrics, write_result
from cfe_hpc.runfolder import RunFolder

__all__ = ["Run", "join"]

logger = logging.getLogger(__name__)

_joined: Run | None = None

_PATIENCE_S = 3600.0
"""For what may be long without being a hang: a save, a restore, an evaluation that gives no sign."""


def join() -> Run:
    """Join the run this process was started for; alone, a private local run.

    Collective: every rank calls it, from its main thread, after anything else that installs signal handlers. Calling
    it again returns the same Run.

    Returns:
        The Run. Inside a run its folder, ranks and device are those of the run; in a script started by hand a new
        run folder is made under `runs/` in the current folder, and nobody requeues it.

    Raises:
        CfeError: the other ranks did not appear, the device asked for is not there, or the run folder is not readable.
        SystemExit: a node is not fit for its part: it is named and avoided, and the run requeued.
    """
    global _joined
    if _joined is None:
        flag = signals.install()
        facts = read_facts()
        path = os.environ.get("CFE_RUN_DIR")
        folder = RunFolder(Path(path)) if path else alone_folder(facts)
        if facts.scheduler == "none":
            facts = replace(facts, attempt=next_attempt(folder))
        spec = RunSpec.read(folder.run_toml)
        place = bootstrap(facts, spec)
        signals.unblock()
        preflight = require(folder, spec, place)
        _joined = Run(folder, spec, place, flag, preflight)
    return _joined


class Run:
    """One rank's view of a run.

    Attributes:
        rank, local_rank, world_size, local_world_size: this process's place.
        device: torch's word for this rank's device, "cuda:0" or "cpu".
        folder: the run folder.
        attempt: allocations of the run before this one.
        params: the job's [params], free-form.
        spec: run.toml.
        group: all ranks, for small collectives beside the training's own.
        ended: a stop has ended this attempt: the SystemExit on its way is no failure of the script's.
    """

    def __init__(
        self, folder: RunFolder, spec: RunSpec, place: Place, flag: signals.StopFlag, preflight: Preflight | None = None
    ) -> None:
        facts = place.facts
        self.folder, self.spec, self.attempt = folder, spec, facts.attempt
        self.rank, self.world_size = facts.rank, facts.world_size
        self.local_rank, self.local_world_size = facts.local_rank, facts.local_world_size
        self.accelerator, self.group = spec.plan.accelerator, place.group
        self.device = place.device.torch_device(facts.local_rank)
        self.params: Mapping[str, Any] = spec.job.params
        self._place, self._flag, self._preflight = place, flag, preflight
        self._scheduler = choose(folder, facts, spec.plan)
        exporter = build_exporter(spec, run_id=spec.run_id, attempt=self.attempt, rank=self.rank)
        self._journal = Journal(folder, spec, facts, exporter)
        self._keeper = Keeper(folder, spec, place, self._journal)
        self._watchdog = Watchdog(folder, facts, spec.job.recovery)
        self._finite = Finite()
        self._roll_backs = RollBacks(folder, spec, place.group, self._journal, self._keeper)
        stop_at_once = self.rank == 0 and self._scheduler.stopping_already()
        self._agreement = Agreement(
            place.group, flag, self._finite, self._journal, self._keeper, stop_at_once=stop_at_once
        )
        self._done = 0
        self._in_body = self._stepped = self.ended = False

    def init_distributed(self) -> None:
        """Start torch.distributed's default process group with the device's backend. Collective.

        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set already, so that a script may also do it
        itself. Does nothing when the group is there.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            self._place.init_process_group()

    def track(self, **objects: Any) -> None:
        """Name what a checkpoint holds: anything with state_dict and load_state_dict, or with the Sharded protocol.

        Call it on every rank, with the same names, before `steps`. What all ranks hold alike, bit for bit, is
        written once, divided among them; what differs is each rank's own.

        Raises:
            UsageError: the loop has begun, a name is taken, or an object has neither protocol.
        """
        self._keeper.track(objects)

    def expect(self, **facts: Any) -> None:
        """State JSON facts that a checkpoint must share (variant, sizes); another value is refused before training."""
        self._keeper.expect(facts)

    def steps(self, total: int, *, imported_step: int = 0) -> Iterator[int]:
        """The steps still to do, counted from 0; collective: every rank runs the loop in the same order.

        After a logged `loss` or `grad_norm` that is not finite everything tracked is put back to the newest checkpoint
        from before, and the numbers go on from there.

        Before the first one, everything tracked and every random generator is restored from the newest checkpoint
        that verifies. After each, at its boundary, ranks agree on whether to stop or save. When told to stop, all
        ranks save, rank 0 has the run requeued, and SystemExit is raised out of the loop. When all steps are done the
        final checkpoint and result.json are written.

        Args:
            total: steps of the whole run, all attempts together.
            imported_step: of these, steps done already by what the script has loaded into the tracked objects, such
                as a checkpoint of another program: a run without a checkpoint of its own begins after them.

        Raises:
            SystemExit: the run was told to stop, and is saved; or a loss or gradient is not finite, and no roll-back is
                left in the budget: the run is held.
            CheckpointMismatch: the checkpoint belongs to another model or variant.
            CorruptCheckpoint: there are checkpoints, and none of them verifies: the run is held.
            NonFinite: a loss or gradient is not finite, and there is no checkpoint to go back to yet: the next attempt
                starts over.
        """
        self._journal.started(total, preflight=None if self._preflight is None else self._preflight.facts())
        facts, plan = self._place.facts, self.spec.plan
        if facts.num_nodes < plan.nodes:
            self._journal.event("degraded", reason="fewer_nodes", detail={"nodes": facts.num_nodes, "of": plan.nodes})
        with self._holding():
            self._done = self._keeper.restore(imported_step)
        self._roll_backs.begin(self._done, self._keeper.objects)
        loading.ends()
        bits = self._agreement.reach().stop_bits
        if bits:
            self._stop(bits, self._done)
        self._journal.step_begins()
        while self._done < total:
            self._in_body = True
            yield self._done
            self._in_body = False
            self._stepped = True
            self._done += 1
            self._journal.step_ends(self._done)
            self._boundary(total)
        self.finish()

    def log(self, **values: Any) -> None:
        """Log values of this step: numbers or tensors of one element; only rank 0's are kept.

        They appear in heartbeat.ndjson and on the exporter at logged steps ([metrics] every_steps), and in the next
        checkpoint's metrics. `tokens` is the step's count over all ranks; tokens per second follow from it.

        `loss` and `grad_norm` are looked at on every rank that logs them, at logged steps and before a save: one that
        is not finite takes the run back (see `steps`). Log a norm under another name where a loss scaler makes it
        infinite now and then by design.
        """
        self._finite.note(self._done + int(self._in_body), values)
        self._journal.log(values)

    def micro_batch(self, wanted: int) -> int:
        """Sequences in one forward pass on one rank: `wanted`, halved each time that device memory ran out.

        Whoever uses it accumulates over as many more passes, so that the global batch stays what it was.
        """
        return max(1, wanted // self._roll_backs.adjusted.micro_batch_divisor)

    @property
    def lr_scale(self) -> float:
        """Factor of the learning rate: 1 until a roll-back, with [recovery] nan_lr_factor, has lowered it. It may
        change from one step to the next."""
        return self._roll_backs.adjusted.lr_scale

    def check_stop(self, *, updated: bool = True) -> None:
        """Let a stop be acted on between two boundaries: in evaluation, warm-up, or another long stretch. Collective.

        Inside the body of `steps` it counts as the boundary of the current step: its update must be done.

        Args:
            updated: False when the current step's update is still to come: the next attempt does the whole step.

        Raises:
            SystemExit: as in `steps`.
        """
        if self._stepped:  # no sooner: the first step may compile for long
            self._watchdog.beat(self._done)
        bits = self._agreement.reach().stop_bits
        if bits:
            self._stop(bits, self._done + int(self._in_body and updated))

    def checkpoint(self) -> None:
        """Save now, whatever the schedule says. Collective; inside the body of `steps`, the update must be done.

        With `checkpoint.async` it is written beside training, after one that is still in flight. Nothing is saved
        where a loss or gradient is not finite: the step's boundary takes the run back.
        """
        if self._agreement.first_bad() is None:
            with self._waiting("checkpoint"):
                self._keeper.begin(self._done + int(self._in_body))

    def phase(self, name: Literal["evaluation", "data"]) -> AbstractContextManager[None]:
        """While the body runs, time counts as the evaluation's, or as waiting for data, and not as the step's.

        An evaluation without `check_stop` may take an hour before it is taken for a hang.
        """
        return self._waiting(name) if name == "evaluation" else self._journal.clock.within(name)

    @contextmanager
    def _waiting(self, phase: Phase) -> Iterator[None]:
        """In a phase that may be long without being a hang."""
        with self._journal.clock.within(phase), self._watchdog.patient(_PATIENCE_S):
            yield

    def end_epoch(self, number: int) -> None:
        """Tell that this step's update was the last of epoch `number`, counted from 0; every rank tells it alike.

        With `checkpoint.keep_epochs` the state at the step's boundary is saved, after a save that is still in flight,
        and that checkpoint is kept.
        """
        self._keeper.end_epoch(number)

    def finish(self, metrics: Mapping[str, float] | None = None) -> None:
        """Write the final checkpoint and result.json; called by `steps` at its end. Collective.

        Args:
            metrics: added to those of the last step. A second call only adds its metrics to result.json.
        """
        if not self._journal.finished:
            self._journal.flush(self._done)
            with self._waiting("checkpoint"):
                self._keeper.save(self._done)
                self._keeper.close()
            self._watchdog.close()
            self._journal.clock.enter("shutdown")
            digest = self._keeper.weights_sha256()
            self._journal.close(timeout_s=5.0)
            self._write_result("COMPLETED", weights_sha256=digest)
            if self.rank == 0:
                self.folder.note_event("completed", attempt=self.attempt, step=self._done)
            self._keeper.tidy(timeout_s=60.0)
            self._journal.finished = True
        if metrics and self.rank == 0:
            add_metrics(self.folder, metrics)
        self.group.barrier()

    def abandon(self) -> None:
        """Take the run's figures off the exporter, briefly: the process ends on an error. Not collective."""
        self._watchdog.close()
        self._journal.close(timeout_s=2.0)

    def _boundary(self, total: int) -> None:
        self._watchdog.beat(self._done)
        last = self._done == total
        look = last or self._keeper.is_due(self._done) or self._done % self.spec.job.metrics.every_steps == 0
        bits, due_by_time, bad_step = self._agreement.reach(time_due=self._keeper.due_by_time(), look=look)
        if bits and not last:  # at the end, what is left to do is what a stop would do: save, and write it down
            self._stop(bits, self._done)
        is_due = due_by_time or self._keeper.is_due(self._done)  # one in flight may have failed in that round
        bad_step = self._agreement.first_bad() if is_due and not look else bad_step
        if bad_step is not None:
            self._go_back(bad_step)
        elif is_due and not last:
            with self._waiting("checkpoint"):
                self._keeper.boundary(self._done, due_by_time=due_by_time)

    def _go_back(self, bad_step: int) -> None:
        """To before the bad step; the run is held where that is not possible. Collective."""
        self._journal.flush(self._done)
        with self._holding(), self._waiting("restore"):
            self._done = self._roll_backs.go_back(self._finite, bad_step=bad_step, done=self._done)

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Hold the run on an error that no further attempt would mend."""
        try:
            yield
        except (CorruptCheckpoint, Spent) as error:
            self._journal.held(str(error), of_exception(error))
            self._write_result("HELD", reason=str(error))
            if isinstance(error, Spent):  # an error after the hold would count against the next attempts
                logger.error("held: %s", error)
                raise Ended(1) from error
            raise

    def _stop(self, bits: int, done: int) -> None:
        """Save on all ranks after `done` steps, learn why, and end this attempt. Collective.

        It returns only when nobody could say why and nobody killed the attempt: then it goes on, for a scheduler
        that cannot be reached cannot start another one.
        """
        names, started_s = timer.names(bits), self._flag.first_s
        self._agreement.heed()
        inquiry = Inquiry(self._scheduler, names, self.spec) if self.rank == 0 else None
        if done > self._done:
            self._journal.step_ends(done)
        self._journal.event("signal", step=done, reason="+".join(names) or "found")
        self._journal.flush(done)
        with self._waiting("checkpoint"):
            self._save_at_stop(done, lambda: None if inquiry is None else inquiry.time_left_s(started_s))
            if self._unanswered(inquiry):
                return
        self._watchdog.close()
        self._journal.clock.enter("shutdown")
        self._keeper.close()
        self._done = done
        self._journal.close(timeout_s=2.0)
        verdict = conclude(
            self.folder,
            self._scheduler,
            self.spec,
            self.group,
            inquiry=inquiry,
            attempt=self.attempt,
            step=done,
            started_s=started_s,
        )
        self._end(verdict, names)

    def _save_at_stop(self, done: int, time_left_s: Callable[[], float | None]) -> None:
        if self._agreement.first_bad() is None:
            self._keeper.save(done, time_left_s)
        else:  # the next attempt finds it, too, and goes back from there
            why = f"{self._finite.what or 'another rank has what is not finite'}: the state is not worth it"
            self._journal.event("checkpoint_failed", step=done, reason="nan", detail=why)

    def _unanswered(self, inquiry: Inquiry | None) -> bool:
        silent = inquiry is not None and inquiry.answer()[0] == "unknown"
        if silent:
            logger.warning("told to stop and saved, but neither told why nor killed: going on")
        return bool(self.group.all_max([int(silent)])[0])

    def _end(self, verdict: Verdict, names: list[str]) -> None:
        self.ended = True
        signals.block()
        if self.rank == 0:
            logger.info("stopping at step %d: %s (%s)", self._done, verdict.action, verdict.why)
        if verdict.action == "cancelled":
            self._write_result("CANCELLED")
        elif verdict.action == "held":
            self._write_result("HELD", reason=verdict.why)
        if self._place.facts.scheduler == "none":
            # Whoever started this by hand sees what any program stopped by that signal shows.
            raise SystemExit(128 + signal.Signals[names[0]])
        raise SystemExit(verdict.exit_code)

    def _write_result(
        self,
        state: Literal["COMPLETED", "CANCELLED", "HELD"],
        *,
        reason: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        if self.rank == 0:
            write_result(
                self.folder,
                state,
                attempts=self.attempt + 1,
                reason=reason,
                final_step=self._done,
                weights_sha256=weights_sha256,
                metrics=self._journal.last_values(),
            )
