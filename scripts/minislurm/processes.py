"""Processes: started in the background, recognised again by pid and start time, and ended with all they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "descendants", "end", "holders_of", "spawn", "wait_until"]


@dataclass(frozen=True)
class Process:
    """A process of this machine. Pids are reused, so the start time (clock ticks since boot) goes with it."""

    pid: int
    started: int

    @staticmethod
    def of(pid: int) -> Process | None:
        """The process with this pid, None when there is none or it has ended and only waits to be reaped."""
        fields = _stat(pid)
        return None if fields is None or fields[0] in "ZX" else Process(pid, int(fields[19]))

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def spawn(argv: Sequence[str], *, env: Mapping[str, str], output: Path, cwd: Path) -> Process:
    """Start a program in a session of its own, with what it prints appended to a file.

    Raises:
        OSError: it could not be started.
    """
    with open(output, "ab") as out:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd, env=dict(env), start_new_session=True
        )
    process = Process.of(child.pid)
    return process if process is not None else Process(child.pid, -1)


def wait_until(ready: Callable[[], bool], *, deadline: float, pause_s: float = 0.05) -> bool:
    """Ask again and again until `ready` says yes or time.monotonic() passes the deadline; the last answer."""
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


def end(processes: Iterable[Process], *, timeout_s: float = 10.0) -> list[Process]:
    """SIGKILL processes and wait until they are gone; those that are still there when the time is up."""
    mine = list(processes)
    for process in mine:
        process.signal(signal.SIGKILL)
    wait_until(lambda: not any(p.alive() for p in mine), deadline=time.monotonic() + timeout_s)
    return [process for process in mine if process.alive()]


def descendants(roots: Iterable[Process]) -> list[Process]:
    """Everything that these processes started and that still hangs below them, themselves left out."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(pid)
    found: list[Process] = []
    todo = [root.pid for root in roots]
    while todo:
        for pid in children.get(todo.pop(), ()):
            process = Process.of(pid)
            if process is not None:
                found.append(process)
            todo.append(pid)
    return found


def holders_of(path: Path, *, command: str) -> list[Process]:
    """Processes named `command` (as in /proc/PID/comm) that hold a file open."""
    wanted = str(path)
    return [process for pid in _pids() if _comm(pid) == command and (process := _if_holds(pid, wanted))]


def _if_holds(pid: int, wanted: str) -> Process | None:
    try:
        if any(os.readlink(entry.path) == wanted for entry in os.scandir(f"/proc/{pid}/fd")):
            return Process.of(pid)
    except OSError:  # it ended, or closed a file, while we looked
        pass
    return None


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on: the name before them may itself hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
