"""A program between the scheduler and the ranks: started, watched, and stop signals handed on past it."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from cfe_hpc.ranks.pids import VARIABLE, Roster
from cfe_hpc.ranks.signals import STOP_SIGNALS, unblock

__all__ = ["Child", "die_with_parent"]

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Have this process killed as soon as the one that started it has ended."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Child:
    """A program, and the stop signals that came for it: each is handed on once, to the ranks that have registered.

    What none has heard the program itself gets, unless it is a launcher: that is started with stop signals
    blocked, and what it starts inherits them so, until it can hear them.

    Attributes:
        seen: names of the signals that came, in order.
        first_s: time.monotonic() of the first.
        roster: the ranks that have registered.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], *, launcher: bool = False) -> None:
        self.seen: list[str] = []
        self.first_s: float | None = None
        self.roster = Roster()
        self._launcher = launcher
        self._told: set[str] = set()
        self._polling = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)
        # Blocked while the child is made: a signal between fork and the line below would be lost on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                list(argv),
                env={**environment, VARIABLE: self.roster.path},
                preexec_fn=die_with_parent if launcher else unblock,
            )
        finally:
            unblock()

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if self.first_s is None:
            self.first_s = time.monotonic()
        if name not in self.seen:
            self.seen.append(name)
            if not self._polling:  # else the next poll does it: the roster must not change while it is being read
                self._hand_on()

    def _hand_on(self) -> None:
        heard = self.roster.tell(self.seen)
        if self._process is None or self._launcher:
            return
        for name in self.seen:
            if name not in self._told and name not in heard:
                self._told.add(name)
                self._process.send_signal(signal.Signals[name])

    def poll(self) -> int | None:
        """Its status as subprocess tells it; None while it runs, or a rank that it started. Call it often: ranks that
        register late get here what came before. What a launcher leaves behind is killed."""
        assert self._process is not None
        self._polling = True
        try:
            if self.seen:
                self._hand_on()
            status = self._process.poll()
            if status is None or not self.roster.living():
                return status
            if self._launcher:
                self.roster.kill()
            return None
        finally:
            self._polling = False

    def kill(self) -> None:
        """Kill it, and the ranks that are known by now. Any thread may call."""
        assert self._process is not None
        self._process.kill()
        self.roster.kill()
