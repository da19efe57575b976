"""kill -9 of ranks and of writers at random moments of asynchronous saves, with rotation going on beside them.

Always there is a verified checkpoint to resume from, it holds what its step must hold, and it is no older than the
newest that was committed; a writer dies with its rank, and neither leaves a file or a process behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
from checkpoint_campaign_worker import POLICY, RUN_ID, difference, resume
from test_checkpoint_async import children, wait_for

from cfe_hpc.checkpoints.folders import committed
from cfe_hpc.checkpoints.keeping.rotation import rotate
from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.checkpoints.reader import Opened

FULL = bool(os.environ.get("CFE_TEST_FULL"))
KILLS = 200 if FULL else 8
SIZES = [(1,), (2,), (1, 2)] if FULL else [(1,), (1, 2)]
SEED = int(os.environ.get("CFE_TEST_SEED", "1"))
WORKER = Path(__file__).with_name("checkpoint_campaign_worker.py")
VICTIMS = ["ranks", "ranks", "ranks", "one rank", "one writer", "writers", "a writer and its rank"]
"""What dies in an attempt. Where something is left alive, that must go on saving (ranks) or end (the other rank)."""


@pytest.fixture
def private_shm() -> Iterator[tuple[list[str], Path]]:
    """Words that start a command with a /dev/shm of its own, and where that is seen from here."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a filesystem")
    script = "mount -t tmpfs tmpfs /dev/shm && echo && exec cat"  # which ends with this process at the latest
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"\n"
            yield ["nsenter", "-m", "-t", str(holder.pid)], Path(f"/proc/{holder.pid}/root/dev/shm")
        finally:
            holder.kill()
            holder.wait()


@dataclass(slots=True)
class Attempt:
    """The ranks of one attempt, and their writers."""

    root: Path
    number: int
    size: int
    prefix: list[str]
    mark: str
    scratch: Path
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    resumed: int = 0

    def start(self) -> None:
        """Return when every rank has resumed and has a writer."""
        pairs = [socket.socketpair() for _ in range(self.size - 1)]
        links = [[one for one, _ in pairs], *([other] for _, other in pairs)]
        env = {**os.environ, "CFE_TEST_MARK": self.mark, "TMPDIR": str(self.scratch)}
        for rank in range(self.size):
            fds = [link.fileno() for link in links[rank]]
            words = [*self.prefix, sys.executable, str(WORKER), str(self.root)]
            words += map(str, [rank, self.size, self.number, *fds])
            with open(self._path(rank, "out"), "wb") as out, open(self._path(rank, "err"), "wb") as err:
                self.ranks.append(subprocess.Popen(words, stdout=out, stderr=err, pass_fds=fds, env=env))
        for pair in pairs:
            for end in pair:
                end.close()
        heads = [self.await_line(rank, "ready") for rank in range(self.size)]
        (self.resumed,) = {int(head.split()[1]) for head in heads}
        for rank in self.ranks:
            self.writers += wait_for(lambda rank=rank: children(rank.pid), "a writer")

    def await_line(self, rank: int, word: str, count: int = 1) -> str:
        """The `count`-th line that a rank has printed and that begins so."""

        def found() -> str | None:
            assert self.ranks[rank].poll() is None, (self.number, self._path(rank, "err").read_text())
            text = self._path(rank, "out").read_text()
            lines = [line for line in text.splitlines(keepends=True) if line.startswith(word) and line.endswith("\n")]
            return lines[count - 1] if len(lines) >= count else None

        return str(wait_for(found, word))

    def _path(self, rank: int, end: str) -> Path:
        return self.root.with_name(f"{self.number}.{rank}.{end}")

    def kill(self, victims: str, rng: random.Random) -> None:
        which = rng.randrange(self.size)
        if victims in ("one writer", "a writer and its rank"):
            os.kill(self.writers[which], signal.SIGKILL)
        if victims == "writers":
            for pid in rng.sample(self.writers, self.size):
                os.kill(pid, signal.SIGKILL)
        if victims in ("one rank", "a writer and its rank"):
            self.ranks[which].kill()
        if victims in ("one writer", "writers"):
            time.sleep(rng.uniform(0.2, 0.5))
            assert all(rank.poll() is None for rank in self.ranks), "a rank ended with its writer"
        if victims == "one rank" or victims == "a writer and its rank":
            for rank in self.ranks:  # nobody has told the other one: it ends by itself
                rank.wait(30)
        for rank in rng.sample(self.ranks, self.size):
            rank.kill()

    def end(self) -> list[tuple[str, str]]:
        """(what each rank printed, its errors), once all are gone."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        return [(self._path(rank, "out").read_text(), self._path(rank, "err").read_text()) for rank in range(self.size)]


def alive(mark: str) -> list[int]:
    """Processes that were started with this mark in their environment, zombies apart."""
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if f"CFE_TEST_MARK={mark}".encode() in (each / "environ").read_bytes().split(b"\0"):
                found.append(int(each.name))
    return found


def phase(root: Path) -> str:
    """How far the save was that a kill cut short."""
    names = os.listdir(root)
    drafts = [sorted(os.listdir(root / name)) for name in names if name.startswith("step-") and ".tmp-" in name]
    if any("manifest.json" in files for files in drafts):
        return "manifest written"
    if any(any(name.endswith(".json") for name in files) for files in drafts):
        return "index written"
    if drafts:
        return "data written" if drafts[0] else "draft made"
    return "deleting" if any(name.startswith(".trash-") for name in names) else "between saves"


def verified(root: Path) -> list[int]:
    """The committed steps, ascending; each must verify and hold what it must."""
    steps = []
    for step, path in reversed(committed(root)):
        opened = Opened.at(path, RUN_ID)
        opened.verify()
        for rank in range(opened.world_size):
            assert difference(opened, rank) is None
        steps.append(step)
    return steps


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: " or ".join(map(str, sizes)))
def test_whatever_is_killed_whenever_the_newest_checkpoint_is_there(
    tmp_path: Path, private_shm: tuple[list[str], Path], sizes: tuple[int, ...]
) -> None:
    prefix, shm = private_shm
    root, scratch, mark = tmp_path / "checkpoints", tmp_path / "tmp", uuid4().hex
    root.mkdir()
    scratch.mkdir()
    phases: Counter[str] = Counter()
    announced: list[int] = []
    there: list[int] = []
    failures = 0
    for number in range(KILLS):
        rng = random.Random(f"{SEED} {sizes} {number}")
        victims, size, saves = rng.choice(VICTIMS), rng.choice(sizes), rng.choice([0, 0, 1, 2, 4])
        delay_s = rng.uniform(0.0, 0.1 if saves else 0.3)
        what = f"CFE_TEST_SEED={SEED}: attempt {number}, {size} ranks, {saves} saves, {delay_s:.3f} s, {victims} killed"
        attempt = Attempt(root, number, size, prefix, mark, scratch)
        try:
            attempt.start()
            if saves:
                attempt.await_line(0, "saved", saves)
            time.sleep(delay_s)
            attempt.kill(victims, rng)
        finally:
            ends = attempt.end()
        for _, errors in ends:
            assert all(word not in errors for word in ("CheckpointError", "Corrupt", "Mismatch", "Assertion")), (
                what,
                ends,
            )
        wait_for(lambda: not alive(mark), "every rank and writer is gone")
        assert (os.listdir(shm), os.listdir(scratch)) == ([], []), what
        assert attempt.resumed >= max(there, default=0), (what, "a committed checkpoint was lost")
        phases[phase(root)] += 1
        lines = [line.split() for output, _ in ends for line in output.splitlines()]
        failed = [words[1] for words in lines if words[0] == "failed"]
        assert all("writer_process_has_ended" in why for why in failed), (what, failed)
        failures += bool(failed)
        saved = sorted({int(words[1]) for words in lines if words[0] == "saved"})
        before = {*announced, *there, attempt.resumed} - {0}
        announced += saved
        there = verified(root)
        kept = {step for step in {*before, *saved} if step % POLICY.keep_every_steps == 0}
        newest_two = sorted({*before, *saved, *there})[-POLICY.keep_last :]  # some are committed, and not yet told of
        assert {*kept, *newest_two} <= {*there}, (what, "a checkpoint that the policy keeps was deleted")
    print(f"CFE_TEST_SEED={SEED}: {dict(phases)}, {len(announced)} saved, {failures} attempts told of a lost writer")
    final = resume(root, KILLS, SoloGroup())
    assert final >= max(there) >= max(announced) >= len(announced) > KILLS // 2
    rotate(root, POLICY, protect={final})
    names = os.listdir(root)
    assert all(name.startswith("step-") and ".tmp-" not in name for name in names), names
    kept = {step for step in {*announced, *there, final} if step % POLICY.keep_every_steps == 0}
    assert kept <= {int(name.removeprefix("step-")) for name in names}
    assert sum(phases.values()) - phases["between saves"] > KILLS // 8, "the kills missed the saves"
