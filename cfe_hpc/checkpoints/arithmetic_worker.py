"""`python -m cfe_hpc.checkpoints.arithmetic_worker ARENA_FD BYTES`: rounds and compares numbers in shared memory.

A process of its own, for it loads numpy, which the command line never does. It takes one request a line on standard
input and answers each with a line.
"""

from __future__ import annotations

import json
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["main"]

_WORDS = {"bool": "u1"}
"""torch's words that are not numpy's."""


def main(arena_fd: int, size_bytes: int) -> None:
    """Answer requests until standard input ends."""
    arena = mmap.mmap(arena_fd, size_bytes)
    for line in sys.stdin:
        request = json.loads(line)
        done = _convert(arena, **request) if request.pop("do") == "convert" else _compare(arena, **request)
        print(json.dumps(done), flush=True)


def _convert(arena: mmap.mmap, *, source: str, target: str, count: int, out: int) -> int:
    """Numbers from the arena's start on, converted, to its byte `out` on; the bytes that they take there."""
    values = _load(arena, source, 0, count)
    converted = _to_bf16(values) if target == "bfloat16" else values.astype(np.float32)
    arena[out : out + converted.nbytes] = converted.tobytes()
    return int(converted.nbytes)


def _load(arena: mmap.mmap, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        words: npt.NDArray[np.uint32] = np.frombuffer(arena, "<u2", count, offset).astype(np.uint32) << np.uint32(16)
        return words.view(np.float32)
    return np.frombuffer(arena, _WORDS.get(dtype, dtype), count, offset)


def _to_bf16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """To nearest, of two equally near the even one; not-a-number stays one, with its sign, and is made quiet."""
    words: npt.NDArray[np.uint32] = values.astype(np.float32).view(np.uint32)
    rounded = (words + (((words >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    nans = (words & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nans.any():
        rounded[nans] = (words[nans] >> np.uint32(16)) | np.uint32(0x40)
    halves: npt.NDArray[np.uint16] = rounded.astype(np.uint16)
    return halves


def _compare(arena: mmap.mmap, *, dtype: str, item_bytes: int, count: int, other: int) -> dict[str, Any]:
    """Numbers from the arena's start on, against those from its byte `other` on."""
    raw = [np.frombuffer(arena, f"V{item_bytes}", count, offset) for offset in (0, other)]
    places = np.flatnonzero(raw[0] != raw[1])
    found: dict[str, Any] = {"differing": int(places.size), "max_abs": None, "max_rel": None, "not_finite": 0}
    if places.size and not dtype.startswith("float8") and dtype != "complex32":
        one, two = (_wide(_load(arena, dtype, offset, count)[places]) for offset in (0, other))
        with np.errstate(all="ignore"):
            apart = np.abs(one - two)
            relative = apart / np.maximum(np.abs(one), np.abs(two))
        finite = np.isfinite(apart)
        found["not_finite"] = int(places.size - finite.sum())
        if finite.any():
            found["max_abs"] = float(apart[finite].max())
            found["max_rel"] = float(np.nan_to_num(relative[finite], nan=0.0).max())  # 0.0 against -0.0
    return found


def _wide(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
