"""A rank's end of its writer process: start it, ask it, hear what became of what was asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from cfe_hpc.checkpoints.beside.company import MOVED
from cfe_hpc.checkpoints.beside.pulse import PULSE_S, SILENCE_S
from cfe_hpc.checkpoints.beside.writer import HELD_SIGNALS, MESSAGE_BYTES
from cfe_hpc.checkpoints.io.staging import Arena
from cfe_hpc.errors import CheckpointError

__all__ = ["Worker", "WorkerLost"]

_CLOSING_S = 10.0
_KILLED_S = 2.0
"""What is killed has ended by then, unless the kernel waits for a disk in its name."""


class WorkerLost(CheckpointError):
    """The writer process has ended, with what it was asked done in part, in full, or not at all."""


class Worker:
    """One writer process and the arena shared with it. Used from the thread that starts it: the process dies with it.

    Attributes:
        arena: what the writer reads; not to be changed between `ask` and the answer.
    """

    def __init__(
        self, module: str = "cfe_hpc.checkpoints.beside.writer", *, silence_s: float | None = SILENCE_S
    ) -> None:
        """
        Args:
            module: what the process runs.
            silence_s: it is given up when it has told nothing for so long; None for never.
        """
        self.arena = Arena()
        self._module = module
        self._attached_bytes = 0
        self._awaited = False
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._answer: dict[str, Any] | None = None
        self._heard_s = 0.0
        self._silence_s = math.inf if silence_s is None else silence_s
        self._given_up: list[subprocess.Popen[bytes]] = []

    @property
    def pid(self) -> int | None:
        """The process id; None while there is no process."""
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether there is a process, and it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> bool:
        """Start the process, unless it runs.

        Returns:
            Whether it is a new one.

        Raises:
            OSError: it cannot be started.
        """
        self._reap()
        if self._process is not None:
            if self.is_alive:
                return False
            self._end()
        link, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-m", self._module]
        words += [str(number) for number in (its_end.fileno(), self.arena.fd, os.getpid())]
        # A stop signal may reach it before it can ignore it: it inherits that they wait.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            with its_end:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(its_end.fileno(), self.arena.fd),
                )
        except OSError:
            link.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._link, self._attached_bytes, self._awaited = link, 0, False
        return True

    def attach(self) -> None:
        """Have the process map all of the arena, at its leisure."""
        if self.arena.size_bytes > self._attached_bytes:
            self._attached_bytes = self.arena.size_bytes
            stays = self.arena.is_pinned or self.arena.is_huge
            self.ask({"do": "attach", "size_bytes": self._attached_bytes, "stays": stays})

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send a request; the answer to the one before must have been taken, unless nobody asks what it is.

        That the process has ended is told by `answer`: it may end at any moment, before this or after.
        """
        assert self._link is not None
        if self._awaited:
            self._receive(waits=True)
        self._answer, self._awaited, self._heard_s = None, True, time.monotonic()
        try:
            self._link.send(json.dumps(request).encode())
        except ConnectionError:
            self._answer, self._awaited = {}, False

    def tell(self, request: Mapping[str, Any]) -> None:
        """Send a request that gets no answer."""
        assert self._link is not None
        with contextlib.suppress(ConnectionError):  # it has ended, which the next one's `answer` tells
            self._link.send(json.dumps(request).encode())

    def busy(self) -> bool:
        """Whether the answer is still to come."""
        self._receive(waits=False)
        return self._answer is None

    def wait(self) -> None:
        """Return when the answer is there."""
        self._receive(waits=True)

    def answer(self) -> dict[str, Any]:
        """The answer, waited for.

        Raises:
            WorkerLost: the process has ended without one.
        """
        self._receive(waits=True)
        assert self._answer is not None
        if self._answer:
            return self._answer
        if self._process is None and self._given_up:
            raise WorkerLost(f"the writer process has moved nothing for {self._silence_s:g} s and was given up")
        raise WorkerLost(f"the writer process has ended ({self._end()})")

    def _receive(self, *, waits: bool) -> None:
        """Take the answer, if it is there, or wait for it. A process that does not get on is given up."""
        while self._answer is None and self._link is not None:
            there = select.select([self._link], [], [], min(PULSE_S, self._silence_s) if waits else 0)[0]
            if there:
                self._take()
            elif time.monotonic() - self._heard_s > self._silence_s:
                self._give_up()
            elif not waits:
                return

    def _take(self) -> None:
        """One message: the answer, or that the process gets on."""
        assert self._link is not None
        self._heard_s = time.monotonic()
        try:
            message = json.loads(self._link.recv(MESSAGE_BYTES) or b"{}")
        except ConnectionError:
            message = {}
        if message != MOVED:
            self._answer, self._awaited = message, False

    def _give_up(self) -> None:
        """Leave the process to itself: it is killed, but while the kernel waits for a disk it does not end."""
        assert self._process is not None and self._link is not None
        self._process.kill()
        self._link.close()
        self._given_up.append(self._process)
        self._process = self._link = None
        self._answer, self._awaited = {}, False

    def _end(self, limit_s: float = _CLOSING_S) -> str:
        """Reap the process, which has ended or has been told to, or is killed after `limit_s`; how it ended."""
        if self._process is None or self._link is None:
            return "it was not started"
        self._link.close()
        try:
            status = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._given_up.append(self._process)
            status = None
        self._process = self._link = None
        if status is None:
            return "not yet: it waits for a disk"
        return f"signal {-status}" if status < 0 else f"status {status}"

    def _reap(self) -> None:
        self._given_up = [process for process in self._given_up if process.poll() is None]

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._reap()
        if self._process is not None:
            self._process.kill()
            self._end(_KILLED_S)

    def close(self) -> None:
        """End the process once it has answered, and give the arena's memory back."""
        self._reap()
        if self._link is not None:
            # Not merely closed: a forked process may hold this end, too.
            self._link.shutdown(socket.SHUT_RDWR)
            self._end()
        self.arena.close()
