"""A watchdog for hangs: when no step ends for far too long, every rank dumps its stacks and the attempt is ended.

Collectives wait for hours, or for ever, for a rank that is stuck. Each rank's watchdog looks by itself, on a thread,
and they meet in the run folder's control/: a stuck process cannot be asked.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from cfe_hpc.config.job import Recovery
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.runfolder import RunFolder

__all__ = ["Watchdog"]

logger = logging.getLogger(__name__)

_STEPS = 64
_LOOK_S = 15.0
_LOOKS = 8
"""At the fewest, in the time of a limit."""
_CLOSE_LOOK_S = 1.0
"""When half of the limit has passed: ranks must notice together, to tell who does not."""
_MEET_S = 5.0
"""For the ranks' notes, once one has noticed: those that have none by then give no sign."""
_STDERR = 2


class Watchdog:
    """Watches one rank. It begins with the first step's end: what comes before has limits of its own.

    A process that was stopped as a whole (SIGSTOP, a suspended job) is no hang of its own: it begins anew when it
    goes on. A script started by hand is told where it hangs, and left alone.
    """

    def __init__(self, folder: RunFolder, facts: RankFacts, recovery: Recovery) -> None:
        self._folder, self._facts = folder, facts
        self._after_s, self._factor = recovery.hang_after, recovery.hang_factor
        self._durations_s: deque[float] = deque(maxlen=_STEPS)
        self._step = -1
        self._step_ended_s = self._sign_s = time.monotonic()
        self._patience_s = 0.0
        self._ends_attempts = facts.scheduler != "none"
        where = f"{facts.attempt}r{facts.restart}" if facts.restart else f"{facts.attempt}"
        self._note, self._note_of_all = f"hang-{where}", f"hung-{where}"
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int) -> None:
        """Give a sign of life, `step` steps done: at each boundary, and wherever ranks agree in between."""
        now_s = time.monotonic()
        if step != self._step:
            if self._thread is not None:
                self._durations_s.append(now_s - self._step_ended_s)
            self._step, self._step_ended_s = step, now_s
        self._sign_s = now_s
        if self._thread is None and self._after_s > 0 and not self._closed.is_set():
            self._thread = threading.Thread(target=self._watch, name="cfe-watchdog", daemon=True)
            self._thread.start()

    def patient(self, at_least_s: float) -> AbstractContextManager[None]:
        """While the body runs, nothing shorter than `at_least_s` is a hang: for a restore, a save, an evaluation that
        gives no sign. The body's end is a sign."""
        return self._patient(at_least_s)

    @contextmanager
    def _patient(self, at_least_s: float) -> Iterator[None]:
        before_s = self._patience_s
        self._sign_s, self._patience_s = time.monotonic(), max(before_s, at_least_s)
        try:
            yield
        finally:
            self._sign_s, self._patience_s = time.monotonic(), before_s

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        if self._thread is not None and self._ends_attempts:
            faulthandler.cancel_dump_traceback_later()

    def limit_s(self) -> float:
        """Seconds without a sign that are a hang."""
        return max(self._usual_limit_s(), self._patience_s)

    def _usual_limit_s(self) -> float:
        return max(self._after_s, self._factor * self._median_s())

    def _median_s(self) -> float:
        durations_s = list(self._durations_s)
        return statistics.median(durations_s) if durations_s else 0.0

    def _watch(self) -> None:
        while True:
            idle_s, limit_s = time.monotonic() - self._sign_s, self.limit_s()
            # Not by the patience of the moment, which may end at once.
            look_s = min(self._usual_limit_s() / _LOOKS, _CLOSE_LOOK_S if idle_s > limit_s / 2 else _LOOK_S)
            if self._ends_attempts:
                # Its thread needs no interpreter: it shows where code is that lets no other Python run.
                faulthandler.dump_traceback_later(max(limit_s - idle_s, 0.0) + 3 * look_s, file=_STDERR)
            began_s = time.monotonic()
            if self._closed.wait(look_s):
                return
            now_s = time.monotonic()
            if now_s - began_s > 3 * look_s + 1.0:
                self._sign_s = now_s  # this very thread did not run: the process was stopped
                continue
            idle_s, limit_s = now_s - self._sign_s, self.limit_s()
            if idle_s > limit_s or (idle_s > limit_s / 2 and self._noticed()):
                self._bark(idle_s)

    def _noticed(self) -> bool:
        """Whether another rank has noticed. By listing: a network filesystem remembers what was not there."""
        return self._ends_attempts and self._note_of_all in self._notes()

    def _notes(self) -> set[str]:
        try:
            return set(os.listdir(self._folder.control))
        except OSError:
            return set()

    def _bark(self, idle_s: float) -> None:
        """Dump this rank's stacks, and end the attempt; who is the first to notice tells of it."""
        what = f"no step for {idle_s:.0f} s after step {self._step} ({self._why()})"
        logger.warning("%s; where this rank is:", what)
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        if not self._ends_attempts:
            self._sign_s = time.monotonic()
            return
        self._folder.note(f"{self._note}.{self._facts.rank}", what, step=self._step)
        if self._folder.note(self._note_of_all, what, rank=self._facts.rank):
            self._tell(what)
        else:
            time.sleep(_MEET_S + 1.0)
        os._exit(1)

    def _why(self) -> str:
        median_s = self._median_s()
        if self._patience_s > self._usual_limit_s():
            return f"in a phase that may take {self._patience_s:g} s"
        if self._factor * median_s > self._after_s:
            return f"{self._factor:g} times the median of {median_s:.3g} s"
        return f"the median is {median_s:.3g} s, and less than {self._after_s:g} s is no hang"

    def _tell(self, what: str) -> None:
        """Write the event, which names the ranks that left no note."""
        facts, deadline_s = self._facts, time.monotonic() + _MEET_S
        while True:
            notes = self._notes()
            silent = [rank for rank in range(facts.world_size) if f"{self._note}.{rank}" not in notes]
            if not silent or time.monotonic() > deadline_s:
                break
            time.sleep(0.2)
        named = ", ".join(f"rank {rank} ({self._host(rank)})" for rank in silent[:4])
        more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
        suspect = silent[0] if silent else facts.rank
        self._folder.note_event(
            "failed",
            attempt=facts.attempt,
            step=self._step,
            rank=suspect,
            host=self._host(suspect),
            reason=f"{what}; no sign of {named}{more}" if silent else f"{what}; every rank waits",
            cause="hang",
        )

    def _host(self, rank: int) -> str:
        """The node of a rank; ranks are handed out node by node."""
        hosts = self._facts.hosts
        return hosts[min(rank // max(1, self._facts.local_world_size), len(hosts) - 1)]
