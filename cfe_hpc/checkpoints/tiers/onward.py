"""`python -m cfe_hpc.checkpoints.tiers.onward SOCKET_FD ARENA_FD PARENT_PID`: takes checkpoints to the remote.

One for the run, beside rank 0; `Onward` is rank 0's end of it. It goes about its work slowly and in the background:
nothing waits for it but the end of the run, and that not for ever.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.beside.workers import Worker, WorkerLost
from cfe_hpc.checkpoints.beside.writer import serve
from cfe_hpc.checkpoints.tiers import places
from cfe_hpc.checkpoints.tiers.remote import Remote

__all__ = ["Onward", "main"]

_NICE = 15
_POLL_S = 0.1


class Onward:
    """What of a run goes to the remote, and when. For rank 0; nothing here is collective.

    One checkpoint is on its way at a time; of those that come meanwhile the newest is next.
    """

    def __init__(
        self, root: Path, url: str, *, run_id: str, attempt: int, keep_last: int | None, every_steps: int | None
    ) -> None:
        """
        Args:
            root: the checkpoints folder.
            keep_last: newest checkpoints that stay at the remote; all when None.
            every_steps: only steps that this divides go there; all when None.
        """
        self._root, self._url, self._run_id, self._attempt = root, url, run_id, attempt
        self._keep_last, self._every_steps = keep_last, every_steps
        self._worker = Worker("cfe_hpc.checkpoints.tiers.onward", silence_s=None)
        self._going: int | None = None
        self._next: int | None = None

    @property
    def steps(self) -> set[int]:
        """Steps on their way, or waiting for it: their folders must stay."""
        return {step for step in (self._going, self._next) if step is not None}

    def offer(self, step: int) -> None:
        """A checkpoint was committed."""
        if self._every_steps is None or step % self._every_steps == 0:
            self._next = step

    def advance(self) -> str | None:
        """Do what is next, without waiting.

        Returns:
            Why the checkpoint that was on its way has not arrived, once; None otherwise.
        """
        failed = None
        if self._going is not None and not self._worker.busy():
            failed = self._arrived(self._going)
            self._going = None
        if self._going is None and self._next is not None:
            self._going, self._next = self._next, None
            try:
                self._worker.start()
                self._worker.ask(
                    {
                        "do": "push",
                        "url": self._url,
                        "run_id": self._run_id,
                        "folder": str(self._root / folders.step_name(self._going)),
                        "keep_last": self._keep_last,
                    }
                )
            except OSError as error:
                self._going = None
                return f"no process for it: {error.strerror}"
        return failed

    def _arrived(self, step: int) -> str | None:
        try:
            answer = self._worker.answer()
            if "failed" in answer:
                return f"step {step}: {answer['failed']}"
            places.record(self._root, step, self._attempt, "remote", [self._url])
            for gone in answer["deleted"]:
                places.record(self._root, gone, self._attempt, "remote", [self._url], gone=True)
        except (WorkerLost, OSError) as error:
            return f"step {step}: {error}"
        return None

    def finish(self, limit_s: float) -> list[str]:
        """Let what is on its way arrive, and what waits too, for at most `limit_s` seconds; what failed."""
        failed, until_s = [self.advance()], time.monotonic() + limit_s
        while self.steps and time.monotonic() < until_s:
            time.sleep(_POLL_S)
            failed.append(self.advance())
        if self.steps:
            failed.append(f"step {max(self.steps)}: not there after {limit_s:g} s")
        return [why for why in failed if why is not None]

    def close(self) -> None:
        """Give up what is on its way: the next attempt offers it again."""
        self._worker.kill()


def main(socket_fd: int, arena_fd: int, parent: int) -> None:
    """Answer requests until the rank closes its end."""
    os.close(arena_fd)  # what it works on lies in files
    serve(socket.socket(fileno=socket_fd), parent, {"push": _push}, nice=_NICE)


def _push(request: Mapping[str, Any]) -> dict[str, Any]:
    remote = Remote(request["url"], request["run_id"])
    pushed_bytes = remote.push(Path(request["folder"]))
    keep_last = request["keep_last"]
    return {"pushed_bytes": pushed_bytes, "deleted": [] if keep_last is None else remote.retain(keep_last)}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
