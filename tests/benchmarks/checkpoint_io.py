"""Saves and loads of checkpoints against the disk's own speed: python tests/benchmarks/checkpoint_io.py [FOLDER] [MB].

One rank. Each round writes and reads the same bytes in each way, one after the other, in a fresh folder; the figures
are medians over rounds of the ratio within a round. Reads are cold: files are synced and dropped from the page cache.
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

from cfe_hpc.checkpoints.protocols import SoloGroup
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


def measure(folder: Path, model: torch.nn.Module, content: memoryview) -> dict[str, float]:
    root, bare, group = folder / "checkpoints", folder / "bare", SoloGroup()
    ways = {
        "save": lambda: save(root, capture({"model": model}, group=group), step=1, attempt=0, run_id="r", group=group),
        "bare write": lambda: bare_write(bare, content),
        "bare direct write": lambda: bare_write(folder / "direct", content, os.O_DIRECT),
        "torch.save, no fsync": lambda: torch.save(model.state_dict(), folder / "torch"),
    }
    times = {name: seconds(ways[name]) for name in random.sample(list(ways), len(ways))}
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
    content = memoryview(mmap.mmap(-1, size_bytes >> 20 << 20))
    content[:] = os.urandom(1 << 20) * (size_bytes >> 20)
    rounds = []
    for _ in range(ROUNDS):
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            rounds.append(measure(folder, model, content))
        finally:
            shutil.rmtree(folder)
    for name in sorted(rounds[0]):
        speed = size_bytes / statistics.median(each[name] for each in rounds) / 1e9
        limits = ("bare read",) if name in ("load", "bare read") else ("bare write", "bare direct write")
        ratio = statistics.median(min(each[limit] for limit in limits) / each[name] for each in rounds)
        print(f"{name:<20} {speed:6.2f} GB/s  {ratio:5.2f} of the limit  ({size_bytes / 1e6:.0f} MB, {ROUNDS} rounds)")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, int(sys.argv[2]) if len(sys.argv) > 2 else 200)
