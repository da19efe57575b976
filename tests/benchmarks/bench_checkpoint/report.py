"""Figures as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COLUMNS = (
    ("", 26),
    ("blocked s", 10),
    ("returns s", 9),
    ("x copy", 20),
    ("safe s", 8),
    ("durable s", 10),
    ("x write", 20),
    ("slower", 8),
    ("lost s", 8),
    ("first x", 12),
    ("load s", 8),
    ("x read", 20),
    ("elsewhere x", 14),
    ("memory x", 9),
)


def table(case: dict[str, Any]) -> Iterator[str]:
    """One case: a line for the limits, one for each way, one for each that failed."""
    rows = case["summary"]
    yield f"\n{case['name']} ({case.get('state_bytes', 0) / 1e9:.3f} GB, {len(case['rounds']) - 1} rounds)"
    if rows:
        best = rows["limits"]
        shown = [f"{word} {_spread(best[key], 3)} s" for word, key in _LIMITS if best[key]]
        if shown:
            yield "limits: " + ", ".join(shown)
        yield " ".join(name.ljust(width) if not name else name.rjust(width) for name, width in COLUMNS)
        for way, row in rows.items():
            if way != "limits":
                yield _line(way, row)
    for way, why in case["failed"].items():
        yield f"{way:<26} failed: {why}"


_LIMITS = (("copy", "copy_s"), ("durable write", "write_s"), ("cold read", "read_s"))


def _line(way: str, row: dict[str, Any]) -> str:
    firsts = [row.get(f"first {key} / median") for key in ("blocked_s", "durable_s")]
    moved = [_median(row[key], 2) for key in row if key.endswith(" / load_s")]
    cells = [
        _median(row["blocked_s"], 3),
        _median(row["returned_s"], 3),
        _spread(row["blocked / copy"]),
        _median(row["safe_s"], 3),
        _median(row["durable_s"], 3),
        _spread(row["durable / write"]),
        _median(row["slower"], 2),
        _median(row["lost_s"], 3),
        "/".join(f"{first:.2f}" for first in firsts if first is not None),
        _median(row["load_s"], 3),
        _spread(row["load / read"]),
        "/".join(moved),
        f"{row['extra / state']:.2f}" if "extra / state" in row else "",
    ]
    padded = [cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS[1:], strict=True)]
    return f"{way:<26} " + " ".join(padded)


def _median(value: dict[str, float] | None, digits: int) -> str:
    return "" if value is None else f"{value['median']:.{digits}f}"


def _spread(value: dict[str, float] | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} [{value['min']:.{digits}f}-{value['max']:.{digits}f}]"


def verdicts(goals: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each goal."""
    yield f"\n{'goal':<48} {'at most':>8} {'met':>7}  measured"
    for goal in goals:
        cells = ", ".join(
            f"{value:.2f}{'' if value <= goal['at_most'] else '!'}" for value in goal["measured"].values()
        )
        yield f"{goal['goal']:<48} {goal['at_most']:>8.2f} {goal['met']:>3}/{goal['of']:<3}  {cells}"
    if goals:
        longest = max((goal["measured"] for goal in goals), key=len)
        yield f"measured, in this order: {'; '.join(longest)}; ! is more than the goal"
