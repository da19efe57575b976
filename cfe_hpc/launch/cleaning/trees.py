"""How much a folder holds, in words short enough to tell later whether it still holds the same."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Tree", "measure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A folder and all below it.

    Attributes:
        size_bytes: of the files, as long as they are, each counted once however many names it has.
        entries: files, links and folders below.
        newest_ns: the latest time of modification of any, the folder itself included, in nanoseconds.
    """

    size_bytes: int
    entries: int
    newest_ns: int


def measure(folder: Path) -> Tree:
    """What a folder holds; links are not followed. What vanishes meanwhile is passed over."""
    size_bytes = entries = newest_ns = 0
    inodes: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        path = waiting.pop()
        try:
            newest_ns = max(newest_ns, os.lstat(path).st_mtime_ns)
            found = list(os.scandir(path))
        except OSError:
            continue
        for entry in found:
            entries += 1
            try:
                facts = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                    continue
            except OSError:
                continue
            newest_ns = max(newest_ns, facts.st_mtime_ns)
            if facts.st_nlink == 1 or (facts.st_dev, facts.st_ino) not in inodes:
                size_bytes += facts.st_size
                inodes.add((facts.st_dev, facts.st_ino))
    return Tree(size_bytes=size_bytes, entries=entries, newest_ns=newest_ns)
