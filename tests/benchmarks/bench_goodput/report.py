"""Figures of the outcomes, as data and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench_goodput.rounds import Outcome
from bench_goodput.ways import OURS

__all__ = ["figures", "table"]


def figures(outcome: Outcome, bare: dict[str, float], steps: int) -> dict[str, Any]:
    """What one outcome comes to.

    Args:
        bare: `imports_s`, `load_s`, `step_s` (the mean) and `save_s` of the same round.
        steps: of the whole run.

    Returns:
        `goodput`: bare seconds of the steps ÷ allocated; `ideal`: what it would be if nothing but imports and a bare
        load had been in their way; the rest is named in seconds or as a ratio.
    """
    useful_s = steps * bare["step_s"] if outcome.weights else 0.0
    start_up_s = bare["imports_s"] + bare["load_s"]
    allocated_s = outcome.allocated_s
    ideal = (allocated_s - len(outcome.attempts) * start_up_s) / allocated_s
    save_s = bare["step_s"] + 1.5 * bare["save_s"]
    return {
        "way": outcome.way,
        "ended": outcome.weights is not None,
        "executed": len(outcome.steps),
        "lost": len(outcome.steps) - len(set(outcome.steps)),
        "restarts": len(outcome.attempts) - 1,
        "allocated_s": allocated_s,
        "goodput": useful_s / allocated_s,
        "ideal": ideal,
        "of_ideal": useful_s / allocated_s / ideal,
        "starts_s": outcome.starts_s,
        "start_ratios": [seconds / start_up_s for seconds in outcome.starts_s],
        "commits_s": outcome.commits_s,
        "commit_ratios": [seconds / save_s for seconds in outcome.commits_s],
    }


_COLUMNS = (("", 22), ("executed", 9), ("lost", 6), ("restarts", 9), ("allocated s", 12), ("goodput", 8), ("ideal", 7))
_COLUMNS += (("of ideal", 18), ("first step after s", 19), ("x bare start", 18))


def table(rows: Sequence[dict[str, Any]], bares: Sequence[dict[str, float]]) -> Iterator[str]:
    """A line for each way, medians over the rounds with the least and the most; then the two ratios of ours."""
    shown = {
        key: _spread([bare[key] for bare in bares], 3)
        for key in ("step_s", "step_median_s", "save_s", "imports_s", "load_s")
    }
    yield "bare: " + ", ".join(f"{key.removesuffix('_s')} {value} s" for key, value in shown.items())
    yield "".join(f"{name:<{width}}" if not name else f"{name:>{width}}" for name, width in _COLUMNS)
    for way in dict.fromkeys(row["way"] for row in rows):
        yield _line(way, [row for row in rows if row["way"] == way])
    ours = [row for row in rows if row["way"] == OURS]
    for what, key, ratio, limit in (
        ("SIGTERM to commit", "commits_s", "commit_ratios", "one step and 1.5 bare saves: at most 1"),
        ("restart to first step", "starts_s", "start_ratios", "imports and a bare load: at most 1.25"),
    ):
        seconds, ratios = [value for row in ours for value in row[key]], [v for row in ours for v in row[ratio]]
        if seconds:
            yield f"{what}: {_spread(seconds, 2)} s, {_spread(ratios, 2)} of {limit}"


def _line(way: str, rows: Sequence[dict[str, Any]]) -> str:
    starts = [seconds for row in rows for seconds in row["starts_s"]]
    cells = [
        *(f"{median(row[key] for row in rows):g}" for key in ("executed", "lost", "restarts", "allocated_s")),
        *(f"{median(row[key] for row in rows):.3f}" for key in ("goodput", "ideal")),
        _spread([row["of_ideal"] for row in rows], 2),
        _spread(starts, 2) if starts else "-",
        _spread([ratio for row in rows for ratio in row["start_ratios"]], 2) if starts else "-",
    ]
    failed = sum(not row["ended"] for row in rows)
    line = f"{way:<{_COLUMNS[0][1]}}" + "".join(
        f"{cell:>{w}}" for cell, (_, w) in zip(cells, _COLUMNS[1:], strict=True)
    )
    return line + (f"  never ended in {failed} of {len(rows)} rounds" if failed else "")


def _spread(values: Sequence[float], digits: int) -> str:
    """Median, and the least and the most where there are several."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} [{min(values):.{digits}f}-{max(values):.{digits}f}]"
