"""Ranks as processes: started together, asked together, ended together with all that they started."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STARTING_S = 120.0
_ENDING_S = 5.0
_ADDRESS = "127.0.0.1"
_KEPT_CHARS = 300
_number = itertools.count()


class RanksFailed(Exception):
    """A rank answered with a failure, ended, or did not answer in time."""


class Ranks:
    """`size` processes with one gloo group."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._log_path = folder / f"log-{next(_number)}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answers: list[int] = []
        self._port = f"{os.getpid()}{next(_number)}"
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // size)
        rendezvous = tempfile.mktemp(dir=folder, prefix="rendezvous-")
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MASTER_ADDR": _ADDRESS,
            "MASTER_PORT": self._port,  # nobody listens there: DeepSpeed names its shared memory by it
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with open(self._log_path, "wb") as log:
            for rank in range(size):
                ours, its = os.pipe()
                settings = {"rank": rank, "size": size, "threads": threads, "rendezvous": rendezvous, "answers": its}
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "bench_checkpoint.rank", json.dumps(settings)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        pass_fds=(its,),
                        env=env,
                        start_new_session=True,
                    )
                )
                os.close(its)
                self._answers.append(ours)
        try:
            self._collect(STARTING_S)
        except RanksFailed:
            self.close()
            raise

    def ask(self, do: str, *, timeout_s: float = 300.0, **words: Any) -> list[dict[str, Any]]:
        """Have all ranks do something; their answers, by rank.

        Raises:
            RanksFailed: with the reason in one line; the ranks are of no more use.
        """
        line = json.dumps({"do": do, **words}).encode() + b"\n"
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        texts = [b""] * self.size
        with selectors.DefaultSelector() as selector:
            for rank, fd in enumerate(self._answers):
                selector.register(fd, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RanksFailed(f"no answer in {timeout_s:.0f} s")
                for key, _ in ready:
                    part = os.read(key.fd, 1 << 20)
                    texts[key.data] += part
                    if not part or part.endswith(b"\n"):
                        selector.unregister(key.fd)
                        self._check(key.data, texts[key.data])
        return [json.loads(text) for text in texts]

    def _check(self, rank: int, text: bytes) -> None:
        if not text:
            last = (self._log_path.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
            raise RanksFailed(f"rank {rank} ended: {last[:_KEPT_CHARS]}")
        failed = json.loads(text).get("failed")
        if failed:
            raise RanksFailed(f"rank {rank}: {failed.splitlines()[0][:_KEPT_CHARS]}")

    def close(self) -> None:
        """End every rank and what it started."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + _ENDING_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            _end_session(process.pid)
            process.wait()
        for fd in self._answers:
            os.close(fd)
        self._answers = []
        for path in Path("/dev/shm").glob(f"deepspeed_*_{_ADDRESS}_{self._port}_*"):
            path.unlink(missing_ok=True)


def _end_session(leader: int) -> None:
    """Kill what is left of a rank and its children: multiprocessing's tracker last, for it removes semaphores."""
    deadline = time.monotonic() + _ENDING_S
    while members := _members(leader):
        late = time.monotonic() > deadline
        for pid, words in members.items():
            if late or b"resource_tracker" not in words:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _members(leader: int) -> dict[int, bytes]:
    """Processes of a session that have not ended, and their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found[int(path.name)] = (path / "cmdline").read_bytes()
    return found
