"""`python -m cfe_hpc.checkpoints.tools.arithmetic_worker ARENA_FD BYTES`: rounds and compares numbers in shared memory.

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

_SLICE = 1 << 20  # numbers at a time: what numpy makes on the way then stays small


def main(arena_fd: int, size_bytes: int) -> None:
    """Answer requests until standard input ends."""
    arena = mmap.mmap(arena_fd, size_bytes)
    for line in sys.stdin:
        request = json.loads(line)
        done = _convert(arena, **request) if request.pop("do") == "convert" else _compare(arena, **request)
        print(json.dumps(done), flush=True)


def _convert(
    arena: mmap.mmap, *, source: str, source_bytes: int, target: str, target_bytes: int, at: int, count: int, out: int
) -> int:
    """Numbers from the arena's byte `at` on, converted, to its byte `out` on; the bytes that they take there."""
    for low in range(0, count, _SLICE):
        values = _load(arena, source, at + low * source_bytes, min(_SLICE, count - low))
        converted = _to_bf16(values) if target == "bfloat16" else values.astype(np.float32)
        place = out + low * target_bytes
        arena[place : place + converted.nbytes] = converted.tobytes()
    return count * target_bytes


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


def _compare(arena: mmap.mmap, *, dtype: str, item_bytes: int, at: int, count: int, other: int) -> list[dict[str, Any]]:
    """Numbers from the arena's byte `at` on, against those from its byte `other` on, slice by slice."""
    return [
        _compare_slice(
            arena, dtype, item_bytes, min(_SLICE, count - low), (at + low * item_bytes, other + low * item_bytes)
        )
        for low in range(0, count, _SLICE)
    ]


def _compare_slice(
    arena: mmap.mmap, dtype: str, item_bytes: int, count: int, offsets: tuple[int, int]
) -> dict[str, Any]:
    word = min(item_bytes, 8)
    raw = [np.frombuffer(arena, f"<u{word}", count * item_bytes // word, offset) for offset in offsets]
    differ = (raw[0] != raw[1]).reshape(count, -1).any(axis=1)
    places = np.flatnonzero(differ)
    found: dict[str, Any] = {"differing": int(places.size), "max_abs": None, "max_rel": None, "not_finite": 0}
    if places.size and not dtype.startswith("float8") and dtype != "complex32":
        one, two = (_wide(_load(arena, dtype, offset, count)[places]) for offset in offsets)
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
