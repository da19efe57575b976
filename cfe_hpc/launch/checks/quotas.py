"""What is left of one's quota on Lustre, where most sites keep runs: `lfs quota` tells, statvfs does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.launch.checks.files import standing
from cfe_hpc.launch.checks.room import kept_bytes, kept_files
from cfe_hpc.process import CommandError, run
from cfe_hpc.units import format_size

__all__ = ["quota_left"]

_TIMEOUT_S = 5.0
_FIELDS = 8  # kbytes, quota, limit, grace; files, quota, limit, grace


class _Left(NamedTuple):
    """What may still be written; None without a limit."""

    size_bytes: int | None
    files: int | None


def quota_left(facts: Facts) -> Iterator[Problem]:
    if shutil.which("lfs") is None:
        return
    folder = standing(facts.runs_root)
    for whose, option, number in (("your", "-u", os.getuid()), ("the group's", "-g", folder.stat().st_gid)):
        left = _left(option, number, folder)
        taken_bytes, taken_files = kept_bytes(facts) or 0, kept_files(facts)
        found = []
        if left.size_bytes is not None and left.size_bytes < taken_bytes:
            found.append(f"{format_size(taken_bytes)}, and {format_size(max(0, left.size_bytes))} are left")
        if left.files is not None and left.files < taken_files:
            found.append(f"{taken_files} files, and {max(0, left.files)} are left")
        if found:
            what = f"checkpoints and logs take up to {'; '.join(found)} of {whose} quota"
            remedy = "lower checkpoint.keep_last, make room (`cfe-hpc gc`), or choose another storage.runs_root"
            yield facts.problem("site.storage.runs_root", what, remedy, str(facts.runs_root))


def _left(option: str, number: int, folder: Path) -> _Left:
    """What Lustre says; nothing where the folder is not on it, or it does not answer."""
    try:
        said = run(["lfs", "quota", "-q", option, str(number), str(folder)], timeout_s=_TIMEOUT_S).stdout
    except CommandError:
        return _Left(None, None)
    words = said.split()  # a long path stands on a line of its own
    start = next((place for place, word in enumerate(words, 1) if word.startswith("/")), len(words))
    numbers = [word.strip("[]*") for word in words[start : start + _FIELDS]]
    if len(numbers) < _FIELDS:
        return _Left(None, None)
    return _Left(_rest(numbers[:3], 1024), _rest(numbers[4:7], 1))


def _rest(numbers: list[str], unit: int) -> int | None:
    """What is left of used, soft and hard limit, of which 0 is none."""
    if not all(number.isdigit() for number in numbers):
        return None
    used, soft, hard = map(int, numbers)
    most = hard or soft
    return (most - used) * unit if most else None
