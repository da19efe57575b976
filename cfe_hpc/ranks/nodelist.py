"""Slurm's compressed node lists, without asking scontrol for each."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cfe_hpc.errors import UsageError

__all__ = ["expand"]

_PART = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")


def expand(nodelist: str) -> list[str]:
    """The hosts of a node list, in its order: "n[01-03,7],m2" is n01, n02, n03, n7, m2.

    Several brackets in one name are multiplied out, the last one fastest, as Slurm does.

    Raises:
        UsageError: a bracket is open, empty, or holds something other than numbers and ranges.
    """
    # The separator must be a comma outside brackets; anything else left over is a stray bracket.
    hosts = [host for part in _PART.findall(nodelist) for host in _multiply(part.strip(), nodelist)]
    if re.sub(_PART, "", nodelist).strip(", "):
        raise UsageError(f"node list: brackets do not match ({nodelist}); expected for example n[01-03,7],m2")
    return hosts


def _multiply(part: str, whole: str) -> Iterator[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        if part:
            yield part
        return
    inside, _, after = rest.partition("]")
    for number in _numbers(inside, whole):
        for tail in _multiply(after, whole) if after else ("",):
            yield f"{before}{number}{tail}"


def _numbers(inside: str, whole: str) -> Iterator[str]:
    for item in inside.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if not match:
            raise UsageError(f"node list: {item!r} is no number or range ({whole}); expected for example n[01-03,7],m2")
        first, last = match.group(1), match.group(2) or match.group(1)
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}d}"
