"""kill -9 of all ranks at random moments of saves that training waits for, of rotations and of resumes: a verified
checkpoint is always there. test_checkpoint_faults.py does it to saves beside training."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_worker import BYTES, POLICY, body

from cfe_hpc.checkpoints.folders import committed
from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.store import newest

KILLS = 200 if os.environ.get("CFE_TEST_FULL") else 12


def start(root: Path, size: int, attempt: int) -> list[subprocess.Popen[str]]:
    pairs = [socket.socketpair() for _ in range(size - 1)]
    links = [[one for one, _ in pairs], *([other] for _, other in pairs)]
    ranks = []
    for rank in range(size):
        fds = [link.fileno() for link in links[rank]]
        words = [sys.executable, str(Path(__file__).with_name("checkpoint_worker.py")), str(root)]
        words += map(str, [rank, size, attempt, *fds])
        ranks.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=fds))
    for one, other in pairs:
        one.close()
        other.close()
    return ranks


def kill(ranks: list[subprocess.Popen[str]], rng: random.Random) -> list[list[str]]:
    """Kill all ranks at about the same time, some saves after they began; the words each had printed."""
    try:
        first = [rank.stdout.readline() for rank in ranks]
        saved = [ranks[0].stdout.readline() for _ in range(rng.choice([0, 1, 2, 4]))]
        time.sleep(rng.uniform(0.0, 0.06))
    finally:
        for rank in rng.sample(ranks, len(ranks)):
            rank.send_signal(signal.SIGKILL)
        ends = [rank.communicate(timeout=30) for rank in ranks]
    assert [line.split()[:1] for line in first] == [["ready"]] * len(ranks), ends
    assert all("CheckpointError" not in errors and "Corrupt" not in errors for _, errors in ends), ends
    return [
        [line.split()[1], *map(str.strip, saved), *output.split()]
        for line, (output, _) in zip(first, ends, strict=True)
    ]


def check(opened: Opened) -> None:
    out = bytearray(BYTES)
    opened.reader.read_into("w", 0, memoryview(out))
    assert out == body(opened.step)


def verified(root: Path) -> set[int]:
    """All steps whose folders are committed; each must verify."""
    steps = set()
    for step, path in committed(root):
        opened = Opened.at(path, "run-1")
        opened.verify()
        check(opened)
        steps.add(step)
    return steps


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [1, 2], ids=["one rank", "two ranks"])
def test_ranks_killed_at_any_moment_resume_from_what_they_saved(tmp_path: Path, size: int) -> None:
    root, rng = tmp_path / "checkpoints", random.Random(size)
    root.mkdir()
    kept: set[int] = set()
    last, moments = 0, set()
    for attempt in range(KILLS):
        words = kill(start(root, size, attempt), rng)
        assert all(int(resumed) >= last for resumed, *_ in words), "a committed step was lost"
        done = max(int(step) for each in words for step in each)
        moments |= {
            name.partition(".tmp-")[0] for name in os.listdir(root) if name.startswith("step-") and ".tmp-" in name
        }
        there = verified(root)
        assert not done or done in there
        wanted = {step for step in kept | there if step % POLICY.keep_every_steps == 0 and step}
        assert wanted <= there, "a checkpoint that the policy keeps was deleted"
        kept, last = wanted, done
    opened = newest(root, run_id="run-1", attempt=KILLS, group=SoloGroup())
    assert opened is not None and opened.step >= last > KILLS // 4
    check(opened)
    assert len(moments) > KILLS // 12, "the kills missed the saves"
    assert [name for name in os.listdir(root) if ".tmp-" in name and ".trash-" not in name] == []
