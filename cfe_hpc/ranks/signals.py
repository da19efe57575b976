"""Signals that mean stop: handlers set a flag and do nothing else; the loop acts on it at a step boundary.

Work inside a handler is how peers deadlock: it may run in the middle of a collective, on one rank of many.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

from cfe_hpc.ranks.pids import register

__all__ = ["STOP_SIGNALS", "StopFlag", "block", "install", "unblock"]

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers and users send: preemption and cancel (TERM), time limit and `requeue RUN` (USR1 or USR2)."""


class StopFlag:
    """Which stop signals have come, as bits: 1 << index in STOP_SIGNALS."""

    def __init__(self) -> None:
        self.bits = 0
        self.first_s: float | None = None
        self._pid = os.getpid()

    def set(self, signum: int) -> None:
        """Note a signal. A process forked from this one (a DataLoader worker) inherits the handler: there it must
        neither die nor stop anything, so that the batch in flight can still be finished."""
        if os.getpid() != self._pid:
            return
        if self.first_s is None:
            self.first_s = time.monotonic()
        self.bits |= 1 << STOP_SIGNALS.index(signal.Signals(signum))

    def clear(self) -> None:
        """Forget what has come: it is being acted on. A signal that comes again counts again."""
        self.bits, self.first_s = 0, None

    @staticmethod
    def names(bits: int) -> list[str]:
        """The signals of agreed bits, by name."""
        return [number.name for index, number in enumerate(STOP_SIGNALS) if bits >> index & 1]


_installed: StopFlag | None = None


def install() -> StopFlag:
    """Handle the stop signals of this process from now on; the same flag however often it is called.

    Call it from the main thread, after anything else that installs handlers (submitit, a launcher). A wrapper of this
    rank sends its signals here from now on, whatever stands between the two.
    """
    global _installed
    flag = _installed if _installed is not None else StopFlag()
    if threading.current_thread() is not threading.main_thread():
        logger.warning("join() runs in a side thread: stop signals cannot be handled; call it from the main thread")
        return flag

    def handle(signum: int, frame: FrameType | None) -> None:
        flag.set(signum)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    _installed = flag
    register()
    return flag


def block() -> None:
    """Hold stop signals back from now on: what they ask for is done. Python itself, once it has begun to end, no longer
    handles them and would die of the TERM that follows a requeue; to a launcher that is a failure."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def unblock() -> None:
    """Let stop signals in that were held back while this program was being started; those that came are delivered
    now, to the handlers that `install` has set."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
