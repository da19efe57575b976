"""Saves and loads of checkpoints against the disk's own speed: python tests/benchmarks/checkpoint_io.py [FOLDER] [MB].

One rank. Each round writes and reads the same bytes in each way, one after the other, in a fresh folder; the figures
are medians over rounds of the ratio within a round. Reads are cold: files are synced and dropped from the page cache.
Of an asynchronous save two times are taken: how long training waits, beside one copy of the state into memory that is
there already; and until it is durable, beside the disk, while this process does arithmetic on one thread.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cfe_hpc.checkpoints.background import Background
from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.checkpoints.rotation import Retention
from cfe_hpc.checkpoints.store import newest, save
from cfe_hpc.checkpoints.tracked import capture, restore

ROUNDS = 9
CHUNK_BYTES = 8 << 20


def seconds(act: Callable[[], object]) -> float:
    os.sync()
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def bare_write(path: Path, content: memoryview, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    for start in range(0, len(content), CHUNK_BYTES):
        os.write(fd, content[start : start + CHUNK_BYTES])
    os.fsync(fd)
    os.close(fd)


def bare_read(path: Path, buffer: memoryview) -> None:
    with open(path, "rb", buffering=0) as stream:
        at = 0
        while got := stream.readinto(buffer[at : at + CHUNK_BYTES]):
            at += got


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def load(root: Path, model: torch.nn.Module) -> None:
    group = SoloGroup()
    opened = newest(root, run_id="r", attempt=0, group=group)
    assert opened is not None
    restore(opened, {"model": model}, group=group)


LIMITS = {
    "load": ("bare read",),
    "bare read": ("bare read",),
    "async, training waits": ("copy",),
    "copy": ("copy",),
}
"""What each way is measured by; the others by the faster bare write."""


def copy(model: torch.nn.Module, memory: memoryview) -> None:
    at = 0
    for value in model.state_dict().values():
        memory[at : at + value.nbytes] = memoryview(value.reshape(-1).view(torch.uint8).numpy().data)
        at += value.nbytes


def beside(saves: Background, model: torch.nn.Module) -> dict[str, float]:
    """One asynchronous save, with the boundaries of short steps going on until it is durable."""
    os.sync()
    left, right = torch.rand(256, 256), torch.rand(256, 256)
    started = time.perf_counter()
    saves.begin(capture({"model": model}, group=saves.group), step=2)
    waited = time.perf_counter() - started
    while (info := saves.advance(saves.busy())) is None:
        torch.mm(left, right)
    return {"async, training waits": waited, "async, until durable": info.seconds}


def measure(folder: Path, model: torch.nn.Module, content: memoryview, saves: Background) -> dict[str, float]:
    root, bare, group = folder / "checkpoints", folder / "bare", SoloGroup()
    ways = {
        "save": lambda: save(root, capture({"model": model}, group=group), step=1, attempt=0, run_id="r", group=group),
        "bare write": lambda: bare_write(bare, content),
        "bare direct write": lambda: bare_write(folder / "direct", content, os.O_DIRECT),
        "torch.save, no fsync": lambda: torch.save(model.state_dict(), folder / "torch"),
    }
    times = {name: seconds(ways[name]) for name in random.sample(list(ways), len(ways))}
    times["copy"] = seconds(lambda: copy(model, content))
    saves.root = folder / "beside"
    times |= beside(saves, model)
    os.sync()
    drop_cache(folder)
    reads = {
        "load": lambda: load(root, model),
        "bare read": lambda: bare_read(bare, memoryview(bytearray(len(content)))),
    }
    return times | {name: seconds(reads[name]) for name in random.sample(list(reads), len(reads))}


def main(parent: str | None, megabytes: int) -> None:
    layer_bytes = 2048 * 2048 * 4
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(megabytes * 10**6 // layer_bytes)))
    size_bytes = sum(value.nbytes for value in model.state_dict().values())
    content = memoryview(mmap.mmap(-1, -(-size_bytes >> 20 << 20)))
    content[:] = os.urandom(1 << 20) * (len(content) >> 20)
    saves = Background(root=Path(), run_id="r", attempt=0, group=SoloGroup(), policy=Retention(keep_last=2))
    saves.reserve(capture({"model": model}, group=saves.group))
    rounds = []
    for _ in range(ROUNDS):
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            rounds.append(measure(folder, model, content, saves))
        finally:
            shutil.rmtree(folder)
    saves.close()
    first = rounds[0]["async, training waits"] / statistics.median(each["async, training waits"] for each in rounds)
    print(f"first asynchronous save: {first:.2f} of the median one")
    for name in sorted(rounds[0]):
        speed = size_bytes / statistics.median(each[name] for each in rounds) / 1e9
        limits = LIMITS.get(name, ("bare write", "bare direct write"))
        ratio = statistics.median(min(each[limit] for limit in limits) / each[name] for each in rounds)
        print(f"{name:<22} {speed:6.2f} GB/s  {ratio:5.2f} of the limit  ({size_bytes / 1e6:.0f} MB, {ROUNDS} rounds)")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else 200)
