"""squeue's rows of job arrays, task by task: tasks that wait share one row, `100_[5-7,9%4]`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["expanded", "ranges", "unranged"]

_WAITING = re.compile(r"(?P<array>\d+)_\[(?P<indices>[^]]*)\]")

# Of an array, for whoever asks for it by its own number: what the first of these that any task is in says of it.
_ORDER = ("RUNNING", "PENDING", "HELD", "UNKNOWN", "FAILED", "CANCELLED", "COMPLETED")


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order as Slurm writes them: `0-3,7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def unranged(text: str) -> Iterator[int]:
    """The numbers of `ranges`, also with Slurm's steps (`0-8:2`) and throttle (`%4`)."""
    for part in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
        if match:
            yield from range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))


def expanded(rows: Mapping[str, Mapping[str, Any]], wanted: Collection[str]) -> dict[str, dict[str, Any]]:
    """The rows of the jobs that are wanted: where that is an array's own number, of its tasks, and one for the whole.

    Args:
        rows: by squeue's word for the job; each has `job_id` and `state`.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for job_id, row in rows.items():
        match = _WAITING.fullmatch(job_id)
        names = [f"{match['array']}_{index}" for index in unranged(match["indices"])] if match else [job_id]
        tasks.update((name, {**row, "job_id": name}) for name in names)
    found = {}
    arrays: dict[str, dict[str, Any]] = {}
    for name, row in tasks.items():
        array, underscore, _ = name.partition("_")
        if name in wanted or (underscore and array in wanted):
            found[name] = row
        if underscore and array in wanted:
            known = arrays.setdefault(array, row)
            if _ORDER.index(row["state"]) < _ORDER.index(known["state"]):
                arrays[array] = row
    return {**found, **{array: {**row, "job_id": array} for array, row in arrays.items()}}
