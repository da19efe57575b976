"""Who is to hear stop signals on this node: each rank writes its process id down, and its wrapper signals those.

A launcher between a wrapper and its ranks (torchrun, deepspeed, a shell) hands signals on late, or ends the ranks
itself half a minute later, or not at all. So ranks are signalled past it, by those who know which they are.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

from cfe_hpc.process import start_ticks

__all__ = ["VARIABLE", "Roster", "register"]

VARIABLE = "CFE_PIDS"
"""Names the roster of this node's wrapper."""


def register() -> bool:
    """Have this process signalled from now on as the one of its LOCAL_RANK, in place of who had registered before it.

    It must be able to hear stop signals, or block them. Where there is no wrapper nothing happens.

    Returns:
        False when there is one and it cannot be told: it has ended, or is out of sight, in a container. Then signals
        come as the scheduler sends them.
    """
    path = os.environ.get(VARIABLE)
    if path is None:
        return True
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError:
        return False
    try:
        pid = os.getpid()
        os.write(fd, f"{os.environ.get('LOCAL_RANK', '0')} {pid} {start_ticks(pid)}\n".encode())
    finally:
        os.close(fd)
    return True


@dataclass(slots=True)
class _Member:
    pid: int
    pidfd: int | None
    """None when it had ended before it was found."""
    told: set[str] = field(default_factory=set)

    def alive(self) -> bool:
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def send(self, signum: signal.Signals) -> None:
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signum)


class Roster:
    """The processes that have registered with this one. It lies in memory: no disk is needed, and nothing is left.

    Attributes:
        path: for VARIABLE of those who are to register.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("cfe-pids")
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._read_bytes = 0
        self._members: dict[str, _Member] = {}
        self._heard: set[str] = set()

    def tell(self, names: Iterable[str]) -> set[str]:
        """Send each signal once to each registered process that runs; the names of all that one has ever been sent.

        A process may end of it at once: who heard a signal has heard it all the same.
        """
        self._refresh()
        for member in self._members.values():
            for name in names:
                if name not in member.told and member.alive():
                    member.told.add(name)
                    self._heard.add(name)
                    member.send(signal.Signals[name])
        return self._heard

    def living(self) -> int:
        """How many of the registered processes run."""
        self._refresh()
        return sum(member.alive() for member in self._members.values())

    def some_have_ended(self) -> bool:
        """Whether a registered process has ended while another one runs."""
        return 0 < self.living() < len(self._members)

    def kill(self) -> None:
        """SIGKILL to those that still run. Any thread may call."""
        for member in list(self._members.values()):
            member.send(signal.SIGKILL)

    def _refresh(self) -> None:
        text = os.pread(self._fd, 1 << 20, self._read_bytes)
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.decode("ascii").splitlines():
            local_rank, pid, ticks = line.split()
            self._enter(local_rank, int(pid), ticks)

    def _enter(self, local_rank: str, pid: int, ticks: str) -> None:
        before = self._members.get(local_rank)
        if before is not None and before.pid == pid and before.alive():
            return
        if before is not None and before.pidfd is not None:
            os.close(before.pidfd)
        self._members[local_rank] = _Member(pid, _open(pid, ticks))


def _open(pid: int, ticks: str) -> int | None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if str(start_ticks(pid)) == ticks:
        return pidfd
    os.close(pidfd)  # it has ended, or another process has its number by now
    return None
