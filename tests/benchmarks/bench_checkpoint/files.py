"""Files and memory, as the rules of MLPerf Storage ask: durable means synced, read means not from the page cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CHUNK_BYTES = 8 << 20


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def size_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in files_of(folder))


def forget(folder: Path) -> None:
    """Drop what lies below a folder from the page cache."""
    for path in files_of(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def write(path: Path, content: memoryview, *, direct: bool) -> None:
    """A bare durable write."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o644)
    try:
        for start in range(0, len(content), CHUNK_BYTES):
            if os.write(fd, content[start : start + CHUNK_BYTES]) != len(content[start : start + CHUNK_BYTES]):
                raise OSError(f"{path}: a short write")
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path, out: memoryview, *, direct: bool) -> None:
    """A bare read of a whole file."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        at = 0
        while at < len(out) and (got := os.readv(fd, [out[at : at + CHUNK_BYTES]])):
            at += got
    finally:
        os.close(fd)


def resident_bytes() -> int:
    """Memory of this process now."""
    return _status("VmRSS")


def start_peak() -> None:
    """Forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process had since `start_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def children_bytes() -> int:
    """Memory that processes below this one have for themselves, not counting files in memory that this one maps, too.

    The kernel calls a page of such a file private while only one process has touched it: a huge page, for one, that a
    helper has made of pages that are in this process' peak already.
    """
    found, total, shared = [os.getpid()], 0, _shared_files()
    for parent in found:
        children = Path(f"/proc/{parent}/task/{parent}/children")
        found += [int(pid) for pid in children.read_text().split()] if children.exists() else []
    for pid in found[1:]:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            total += _private_bytes(pid, shared)
    return total


def _private_bytes(pid: int, shared: set[tuple[str, str]]) -> int:
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *words = line.split()
        if not key.endswith(":"):  # a new mapping
            counts = _file(words) not in shared
        elif counts and key.startswith("Private_"):
            total += int(words[0]) * 1024
    return total


def _shared_files() -> set[tuple[str, str]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return {_file(words) for _, *words in lines if words[0].endswith("s")}


def _file(words: list[str]) -> tuple[str, str]:
    """Device and inode of a mapping, by what stands behind its addresses."""
    return words[2], words[3]
