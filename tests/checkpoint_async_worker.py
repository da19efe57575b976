"""One rank that saves beside its steps until it is killed; started by test_checkpoint_async.py."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path

from checkpoint_groups import SocketGroup
from checkpoint_worker import BYTES, POLICY, body

from cfe_hpc.checkpoints.background import Background
from cfe_hpc.checkpoints.protocols import Piece
from cfe_hpc.checkpoints.rotation import Retention
from cfe_hpc.checkpoints.store import Content, newest
from cfe_hpc.errors import CheckpointError


def main(root: Path, rank: int, size: int, attempt: int, links: list[int]) -> None:
    group = SocketGroup(rank, size, [socket.socket(fileno=fd) for fd in links])
    opened = newest(root, run_id="run-1", attempt=attempt, group=group)
    step = resumed = 0 if opened is None else opened.step
    policy = Retention(keep_last=POLICY.keep_last, keep_every_steps=POLICY.keep_every_steps)
    saves = Background(root=root, run_id="run-1", attempt=attempt, group=group, policy=policy, protect=[resumed])
    saves.start()
    print("ready", step, flush=True)
    while True:
        # A writer that is killed alone is a failed save; the rank goes on.
        with contextlib.suppress(CheckpointError):
            info = saves.advance(bool(group.all_max([int(saves.busy())])[0]))
            if info is not None:
                print(info.step, flush=True)
        step += 1
        if saves.in_flight is None:
            whole, low, high = bytearray(body(step)), BYTES * rank // size, BYTES * (rank + 1) // size
            piece = Piece(name="w", dtype="uint8", shape=(BYTES,), start=low, data=memoryview(whole)[low:high])
            saves.begin(Content(pieces=[piece]), step=step)
            whole[:] = bytes(BYTES)
        time.sleep(0.001)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), links=[int(fd) for fd in sys.argv[5:]])
