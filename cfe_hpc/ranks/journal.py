"""What rank 0 writes down while it trains: events, heartbeats, and the exporter's values. Other ranks write nothing."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from cfe_hpc.config.run import RunSpec
from cfe_hpc.files import append_ndjson
from cfe_hpc.metrics.exporter import Exporter, NullExporter
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.phases import PhaseClock, process_age_s
from cfe_hpc.ranks.stopping import hold
from cfe_hpc.ranks.timer import StopTimer, allocated_s
from cfe_hpc.recovery import fencing, lead, ledger
from cfe_hpc.recovery.causes import Cause
from cfe_hpc.recovery.contract import time_to_save_s
from cfe_hpc.recovery.measured import need_s, save_interval_s
from cfe_hpc.runfolder import Event, RunFolder, utc_now

__all__ = ["Journal"]

logger = logging.getLogger(__name__)

_LOOK_FOR_SUCCESSOR_S = 5.0

_BEAT_KEYS = ("time", "attempt", "step", "spent")


class Journal:
    """Events and heartbeats of one attempt, as rank 0 sees it.

    Attributes:
        clock: where this rank's time goes; on every rank, for its phases are entered alike. Rank 0's is written down.
        save_every_s: seconds after which rank 0 wants a save, whatever the schedule says: the grace of a preemption is
            too short for one. None as long as it is not.
        finished: result.json says COMPLETED.
    """

    def __init__(self, folder: RunFolder, spec: RunSpec, facts: RankFacts, exporter: Exporter) -> None:
        self._folder, self._facts, self._exporter = folder, facts, exporter
        self._time_to_save_s = time_to_save_s(spec.plan, spec.site)
        self._adapts = spec.job.recovery.adapt_saves
        self._every_steps = spec.job.metrics.every_steps
        self._speaks = facts.rank == 0
        self._pending: dict[str, Any] = {}
        self._since_save: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._tokens = 0.0
        self._steps = 0
        self._spent: dict[str, float] = {}
        self._lost_lines = 0
        self._seen = lead.Observations()
        self._timer = StopTimer(facts, spec.plan)
        self._grace_told = False
        self._looked_s = 0.0
        self.clock = PhaseClock()
        self.save_every_s: float | None = None
        self.finished = False

    def event(self, event: Event, **fields: Any) -> None:
        """Append an event of this attempt (rank 0 only)."""
        if self._speaks:
            self._write(lambda: self._folder.append_event(event, attempt=self._facts.attempt, **fields))

    def saved(self, step: int, *, seconds: float, blocked_seconds: float, name: str) -> None:
        """Tell of a checkpoint that is committed, and learn from it how long a stop takes (rank 0 only).

        Args:
            seconds: from the save's beginning until it was committed.
            blocked_seconds: of these, how long training waited.
        """
        if not self._speaks:
            return
        took = {"seconds": round(seconds, 3), "blocked_seconds": round(blocked_seconds, 3)}
        self.event("checkpoint_saved", step=step, **took, detail=name)
        self._seen.save(seconds, blocked_seconds)
        self._learn()

    def out_of_time(self) -> bool:
        """Whether a stop for the time limit must begin now, though no signal has come; True once (rank 0 only)."""
        return self._speaks and self._timer.due()

    def _learn(self) -> None:
        """Act on how long a stop takes by now."""
        measured = self._seen.measured()
        if measured is None:
            return
        needed_s, room_s = need_s(measured), self._time_to_save_s
        self._timer.need(needed_s)
        if room_s is None or needed_s <= room_s:
            return
        if not self._grace_told:
            self._grace_told = True
            detail = f"a step and a save take {needed_s:.1f} s (p95), a preemption leaves {room_s:g} s"
            logger.warning("grace_too_short: %s", detail)
            self.event("degraded", reason="grace_too_short", detail=detail)
        if self._adapts:
            self._save_every(save_interval_s(measured))

    def _save_every(self, seconds: float) -> None:
        told_s, self.save_every_s = self.save_every_s, seconds
        if told_s is None:
            self.event("degraded", reason="saves_more_often", detail={"every_s": round(seconds, 1)})

    def _write(self, line: Callable[[], None]) -> bool:
        """A line that cannot be written, for want of room or of the disk, is lost: it is not worth the run.

        Returns:
            Whether it is written.
        """
        try:
            line()
        except OSError as error:
            if not self._lost_lines:
                logger.warning("events and heartbeats are lost: %s: %s", self._folder.path, error.strerror)
            self._lost_lines += 1
            return False
        if self._lost_lines:
            logger.warning("%d events and heartbeats were lost", self._lost_lines)
            self._lost_lines = 0
        return True

    def started(self, total: int, *, preflight: Mapping[str, Any] | None = None) -> None:
        """Note that this attempt's ranks are up. What an earlier attempt wrote of an end is no longer true.

        Args:
            preflight: what the test of the nodes has found, for the event.
        """
        if self._speaks:
            self._folder.reopen()
            fencing.begin(self._folder, self._facts.attempt)
            self._seen = lead.observe(self._folder)
            self._learn()
        if not isinstance(self._exporter, NullExporter):
            self._publish_books(total)
        self.event(
            "started",
            host=socket.gethostname(),
            detail={
                "job_id": self._facts.job_id,
                "world_size": self._facts.world_size,
                "hosts": list(self._facts.hosts),
                "total_steps": total,
                "startup_seconds": round(process_age_s(), 3),
                "allocated_s": allocated_s(),
                "restart": self._facts.restart,
                "preflight": preflight,
            },
        )
        self.clock.enter("restore")

    def _publish_books(self, total: int) -> None:
        """Export what earlier attempts came to. It reads their heartbeats whole: only for an exporter that listens."""
        books = ledger.summarise(self._folder)
        figures = {"total_steps": total, "lost_steps": books.lost_steps, "goodput": books.goodput}
        known = {name: float(value) for name, value in figures.items() if value is not None}
        self._exporter.publish(known, step=books.last_step)

    def log(self, values: Mapping[str, Any]) -> None:
        """Keep values until the step ends. Tensors stay on their device: only logged steps wait for them."""
        if not self._speaks:
            return
        # A loss that hangs on its graph would keep the activations of the whole step.
        plain = {name: value.detach() if hasattr(value, "detach") else value for name, value in values.items()}
        self._pending.update(plain)
        self._tokens += float(values.get("tokens", 0))

    def step_begins(self) -> None:
        """Be at the steps from now on: after a restore, or a stop that came to nothing."""
        self.clock.enter("step")

    def step_ends(self, done: int) -> None:
        """Close a step's books; at a logged step write the heartbeat and hand the values to the exporter.

        Args:
            done: steps done so far, this one included.
        """
        self._steps += 1
        if done % self._every_steps == 0:
            self.flush(done)

    def flush(self, done: int) -> None:
        """Write the heartbeat of the steps since the last one; at a logged step, before a roll-back, and when the
        attempt ends."""
        if not self._speaks or not self._steps:
            return
        self.leave_to_successor(looked_within_s=_LOOK_FOR_SUCCESSOR_S)
        for phase, seconds in self.clock.take().items():
            self._spent[phase] = self._spent.get(phase, 0.0) + seconds
            if phase not in ("startup", "restore"):
                self._seen.trained_s += seconds
        values = {name: float(value) for name, value in self._pending.items() if name != "tokens"}
        in_steps_s, waiting_s = self._spent.get("step", 0.0), self._spent.get("data", 0.0)
        values["step_seconds"] = in_steps_s / self._steps
        if self._tokens:
            values["tokens_per_second"] = self._tokens / max(in_steps_s + waiting_s, 1e-9)
        self._exporter.publish(values, step=done)
        self._last.update(values)
        self._since_save.update(values)
        self._seen.steps_s.append(values["step_seconds"])
        record = {"time": utc_now(), "attempt": self._facts.attempt, "step": done}
        record |= {name: float(f"{value:.9g}") for name, value in values.items()}
        record["spent"] = {phase: round(seconds, 6) for phase, seconds in self._spent.items()}
        if self._write(lambda: append_ndjson(self._folder.heartbeat_path, record)):
            # What could not be written is in the next line: no second is lost from the books.
            self._tokens, self._steps, self._spent = 0.0, 0, {}
        self._pending = {}

    def leave_to_successor(self, *, looked_within_s: float = 0.0) -> None:
        """End this process where a later attempt has begun: Slurm has given this one up, and its node did not hear.
        Before it commits anything, and now and then (rank 0 only).

        Args:
            looked_within_s: do nothing when it was looked for within so many seconds.
        """
        now_s = time.monotonic()
        if not self._speaks or now_s - self._looked_s < looked_within_s:
            return
        self._looked_s = now_s
        newest = fencing.superseded(self._folder, self._facts.attempt)
        if newest is not None:
            logger.error("attempt %d has begun: attempt %d ends here", newest, self._facts.attempt)
            os._exit(1)

    def last_values(self) -> dict[str, float]:
        """The newest value of everything logged in this attempt; the run's last heartbeat when it trained no step."""
        if self._last:
            return dict(self._last)
        last = deque(self._folder.heartbeats(), maxlen=1)
        return {name: value for name, value in last[0].items() if name not in _BEAT_KEYS} if last else {}

    def take_metrics(self) -> dict[str, float]:
        """What was logged since the last call: a checkpoint is judged by its own values, not by those of an earlier."""
        taken, self._since_save = self._since_save, {}
        return taken

    def publish(self, values: Mapping[str, float], step: int) -> None:
        """Hand values to the exporter outside a step (checkpoint figures)."""
        if self._speaks:
            self._exporter.publish(values, step=step)

    def held(self, reason: str, cause: Cause) -> None:
        """Hold the run (rank 0 only): nothing follows until `requeue RUN`."""
        if self._speaks:
            hold(self._folder, attempt=self._facts.attempt, step=None, why=reason, cause=cause)

    def close(self, timeout_s: float) -> None:
        """Stop exporting; the run's group on the Pushgateway is deleted. At most `timeout_s` seconds."""
        self._exporter.close(timeout_s)
