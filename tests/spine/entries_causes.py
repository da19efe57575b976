"""Entries of job files, copied beside them: each goes wrong for real, in its first attempt or in all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Sum:
    """The smallest thing that has a state."""

    def __init__(self) -> None:
        self.total = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def adding(run: Any, go_wrong: Callable[[], object] = lambda: None) -> None:
    """Add the step numbers up; in the step that params name, one rank does what goes wrong, once or in each attempt."""
    found = Sum()
    run.track(sum=found)
    for step in run.steps(run.params["steps"]):
        chosen = step == run.params["wrong_step"] and run.rank == run.params.get("wrong_rank", 0)
        if chosen and (run.attempt == 0 or run.params.get("always")):
            go_wrong()
        found.total += step
        run.log(total=found.total)


def raising(run: Any) -> None:
    adding(run, lambda: 1 // 0)


def killed(run: Any) -> None:
    adding(run, lambda: os.kill(os.getpid(), signal.SIGKILL))


def greedy(run: Any) -> None:
    """Take memory until the kernel has none left to give in this cgroup."""

    def take() -> None:
        taken = []
        while True:
            taken.append(b"\1" * (16 << 20))

    adding(run, take)


def crowded(run: Any) -> None:
    """Take as much memory of the device, which is the host here, as a micro-batch needs; half of it fits."""
    import resource

    import torch

    def take() -> None:
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        room_bytes = used_bytes + (640 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room_bytes, resource.RLIM_INFINITY))
        torch.zeros(run.micro_batch(16), 64 << 20, dtype=torch.uint8)

    adding(run, take)


def cut_off(run: Any) -> None:
    """Lose every connection to other processes."""

    def cut() -> None:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # one that listens is not connected
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    with socket.socket(fileno=os.dup(int(name))) as mine:
                        mine.getpeername()
                        mine.shutdown(socket.SHUT_RDWR)

    adding(run, cut)


def importing(run: Any) -> None:
    """Use a package that is not installed here."""
    import no_such_package  # type: ignore[import-not-found]

    no_such_package.use(run)


def reading(run: Any) -> None:
    """Read the token file that params name."""
    import numpy

    from cfe_hpc.data.windows import TokenWindows

    windows = TokenWindows(run.params["data"], seq_len=16)
    adding(run, lambda: windows.read(numpy.array([0])))


def writing(run: Any) -> None:
    """Write more than the disk that params name can take."""
    adding(run, lambda: (Path(run.params["disk"]) / "much").write_bytes(bytes(1 << 20)))
