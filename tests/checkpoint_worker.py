"""One rank that saves in a loop until it is killed; started by test_checkpoint_kill.py."""

from __future__ import annotations

import random
import socket
import sys
from pathlib import Path

from checkpoint_groups import SocketGroup

from cfe_hpc.checkpoints.keeping.rotation import rotate
from cfe_hpc.checkpoints.protocols import Piece
from cfe_hpc.checkpoints.store import Content, newest, save
from cfe_hpc.config.job import Checkpoint

BYTES = 1_500_000
POLICY = Checkpoint(keep_last=2, keep_every_steps=10)


def body(step: int) -> bytes:
    return random.Random(step).randbytes(BYTES)


def main(root: Path, rank: int, size: int, attempt: int, links: list[int]) -> None:
    group = SocketGroup(rank, size, [socket.socket(fileno=fd) for fd in links])
    opened = newest(root, run_id="run-1", attempt=attempt, group=group)
    step = resumed = 0 if opened is None else opened.step
    print("ready", step, flush=True)
    while True:
        step += 1
        whole, low, high = body(step), BYTES * rank // size, BYTES * (rank + 1) // size
        piece = Piece(name="w", dtype="uint8", shape=(BYTES,), start=low, data=memoryview(whole)[low:high])
        save(root, Content(pieces=[piece]), step=step, attempt=attempt, run_id="run-1", group=group)
        print(step, flush=True)
        if rank == 0:
            rotate(root, POLICY, protect={resumed, step})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), links=[int(fd) for fd in sys.argv[5:]])
