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
from cfe_hpc.ranks.stopping import hold
from cfe_hpc.recovery import ledger
from cfe_hpc.runfolder import Event, RunFolder, utc_now

__all__ = ["Journal"]

logger = logging.getLogger(__name__)

_BEAT_KEYS = ("time", "attempt", "step")


def process_age_s() -> float:
    """Seconds since this process was started, imports and an exec of a program in its place included."""
    with (
        open("/proc/self/stat", encoding="ascii", errors="replace") as stat,
        open("/proc/uptime", encoding="ascii") as up,
    ):
        # The name in brackets may hold spaces and brackets itself; starttime is the 20th field after it.
        started_ticks = int(stat.read().rpartition(")")[2].split()[19])
        return float(up.read().split()[0]) - started_ticks / os.sysconf("SC_CLK_TCK")


class Journal:
    """Events and heartbeats of one attempt, as rank 0 sees it.

    Attributes:
        finished: result.json says COMPLETED.
    """

    def __init__(self, folder: RunFolder, spec: RunSpec, facts: RankFacts, exporter: Exporter) -> None:
        self._folder, self._facts, self._exporter = folder, facts, exporter
        self._every_steps = spec.job.metrics.every_steps
        self._speaks = facts.rank == 0
        self._pending: dict[str, Any] = {}
        self._since_save: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._tokens = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._began_s = time.monotonic()
        self._lost_lines = 0
        self.finished = False

    def event(self, event: Event, **fields: Any) -> None:
        """Append an event of this attempt (rank 0 only)."""
        if self._speaks:
            self._write(lambda: self._folder.append_event(event, attempt=self._facts.attempt, **fields))

    def _write(self, line: Callable[[], None]) -> None:
        """A line that cannot be written, for want of room or of the disk, is lost: it is not worth the run."""
        try:
            line()
        except OSError as error:
            if not self._lost_lines:
                logger.warning("events and heartbeats are lost: %s: %s", self._folder.path, error.strerror)
            self._lost_lines += 1
            return
        if self._lost_lines:
            logger.warning("%d events and heartbeats were lost", self._lost_lines)
            self._lost_lines = 0

    def started(self, total: int) -> None:
        """Note that this attempt's ranks are up. What an earlier attempt wrote of an end is no longer true."""
        if self._speaks:
            self._folder.reopen()
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
            },
        )

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
        self._pending.update(values)
        self._tokens += float(values.get("tokens", 0))

    def step_begins(self) -> None:
        """Start the step's clock: after a restore or a save, whose time is not the step's."""
        self._began_s = time.monotonic()

    def step_ends(self, done: int) -> None:
        """Close a step's books; at a logged step write the heartbeat and hand the values to the exporter.

        Args:
            done: steps done so far, this one included.
        """
        now_s = time.monotonic()
        self._seconds += now_s - self._began_s
        self._began_s = now_s
        self._steps += 1
        if done % self._every_steps == 0:
            self.flush(done)

    def flush(self, done: int) -> None:
        """Write the heartbeat of the steps since the last one; at a logged step, and when the attempt ends."""
        if not self._speaks or not self._steps:
            return
        values = {name: float(value) for name, value in self._pending.items() if name != "tokens"}
        values["step_seconds"] = self._seconds / self._steps
        if self._tokens:
            values["tokens_per_second"] = self._tokens / max(self._seconds, 1e-9)
        rounded = {name: float(f"{value:.9g}") for name, value in values.items()}
        record = {"time": utc_now(), "attempt": self._facts.attempt, "step": done, **rounded}
        self._write(lambda: append_ndjson(self._folder.heartbeat_path, record))
        self._exporter.publish(values, step=done)
        self._last.update(values)
        self._since_save.update(values)
        self._pending, self._tokens, self._seconds, self._steps = {}, 0.0, 0.0, 0

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

    def held(self, reason: str) -> None:
        """Hold the run (rank 0 only): nothing follows until `requeue RUN`."""
        if self._speaks:
            hold(self._folder, attempt=self._facts.attempt, step=None, why=reason)

    def close(self, timeout_s: float) -> None:
        """Stop exporting; the run's group on the Pushgateway is deleted. At most `timeout_s` seconds."""
        self._exporter.close(timeout_s)
