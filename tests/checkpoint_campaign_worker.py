"""One rank that resumes, checks what it got, and saves beside its steps until it is killed; started by
test_checkpoint_faults.py. It has no torch, and a group that ends it when another rank has gone."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

from checkpoint_groups import SocketGroup

from cfe_hpc.checkpoints import store
from cfe_hpc.checkpoints.agree import all_ranks
from cfe_hpc.checkpoints.beside.background import Background
from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.protocols import Piece
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.store import Content
from cfe_hpc.errors import CheckpointError

BYTES = 1_500_000
RUN_ID = "run-1"
POLICY = Retention(keep_last=2, keep_every_steps=7)


def body(step: int) -> bytes:
    """The shared tensor after a step; its length changes from step to step, too."""
    return random.Random(step).randbytes(BYTES + step % 5 * 4000 + step)


def own(step: int, rank: int) -> bytes:
    """What a rank alone holds after a step."""
    return random.Random(-1 - step * 8 - rank).randbytes(3000 + 100 * rank + step)


def content(step: int, rank: int, size: int) -> tuple[Content, list[bytearray]]:
    """A rank's part after a step, and the memory that it aliases."""
    whole = body(step)
    low, high = len(whole) * rank // size, len(whole) * (rank + 1) // size
    memory = [bytearray(whole[low:high]), bytearray(own(step, rank))]
    shared, mine = (memoryview(each) for each in memory)
    made = Content(
        pieces=[Piece(name="w", dtype="uint8", shape=(len(whole),), start=low, data=shared)],
        own=[Piece(name="mine", dtype="uint8", shape=(len(mine),), start=0, data=mine)],
        state={"step": step, "rank": rank},
    )
    return made, memory


def difference(opened: Opened, rank: int) -> str | None:
    """What of an opened checkpoint is not what its step must hold, as `rank` sees it; None when all of it is."""
    step, saver = opened.step, opened.saved_by(rank)
    wanted = [(opened.reader, "w", body(step)), (opened.own(rank), "mine", own(step, saver))]
    for reader, name, content in wanted:
        if reader.describe(name) != ("uint8", (len(content),)):
            return f"step {step}: {name} has {reader.describe(name)}"
    found = [bytearray(len(content)) for _, _, content in wanted]
    for (reader, name, _), out in zip(wanted, found, strict=True):
        reader.enqueue(name, 0, memoryview(out))
    opened.reader.flush()
    for (_, name, content), out in zip(wanted, found, strict=True):
        if out != content:
            return f"step {step}: {name} has other bytes"
    state = opened.state(rank)
    return None if state == {"step": step, "rank": saver} else f"step {step}: the state is {state}"


def resume(root: Path, attempt: int, group: Any, report: store.Report | None = None) -> int:
    """The step that is resumed from, its content compared bit for bit; 0 when there is none."""

    def load(opened: Opened) -> None:
        def compare() -> bytes:
            wrong = difference(opened, group.rank)
            assert wrong is None, wrong
            return b""

        all_ranks(group, compare)

    opened = store.resume(root, load, run_id=RUN_ID, attempt=attempt, group=group, report=report)
    return 0 if opened is None else opened.step


def main(root: Path, rank: int, size: int, attempt: int, links: list[int]) -> None:
    group = SocketGroup(rank, size, [socket.socket(fileno=fd) for fd in links])
    step = resumed = resume(root, attempt, group)
    saves = Background(root=root, run_id=RUN_ID, attempt=attempt, group=group, policy=POLICY, protect=[resumed])
    saves.start()
    print("ready", step, flush=True)
    while True:
        # A writer that is killed alone is a failed save; the rank goes on.
        try:
            info = saves.advance(bool(group.all_max([int(saves.busy())])[0]))
            if info is not None:
                print("saved", info.step, flush=True)
        except CheckpointError as error:
            print("failed", str(error).replace(" ", "_"), flush=True)
        step += 1
        if saves.in_flight is None:
            made, memory = content(step, rank, size)
            with contextlib.suppress(CheckpointError):
                saves.begin(made, step=step)
            for each in memory:
                each[:] = bytes(len(each))
        time.sleep(0.001)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), links=[int(fd) for fd in sys.argv[5:]])
