"""From rounds to figures: medians with the least and the most, and ratios to the limit of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from bench_checkpoint.plan import BARE

Round = dict[str, dict[str, Any]]


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least and most of what is there."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def limits(figures: Round) -> dict[str, float]:
    """The limits of one round: the best copy, durable write and cold read."""
    best = {}
    for key, kind in (("copy_s", "copy"), ("write_s", "bare"), ("read_s", "bare")):
        found = [each[key] for unit, each in figures.items() if unit.startswith(f"{kind} ")]
        if found:
            best[key] = min(found)
    return best


def summary(case: dict[str, Any]) -> dict[str, Any]:
    """A row of figures for each way of a case, and one for the limits."""
    first, rounds = case["rounds"][0], case["rounds"][1:] or case["rounds"]
    best = [limits(figures) for figures in rounds]
    rows: dict[str, Any] = {
        "limits": {key: spread(each.get(key) for each in best) for key in ("copy_s", "write_s", "read_s")}
    }
    for way in (way for way in case["ways"] if way in first):
        rows[way] = _row(way, first, rounds, best, case["state_bytes"])
    return rows


def _row(way: str, first: Round, rounds: list[Round], best: list[dict[str, float]], state_bytes: int) -> dict[str, Any]:
    def over(key: str, limit: str | None = None, per_byte: bool = False) -> dict[str, float] | None:
        values = []
        for figures, limit_s in zip(rounds, best, strict=True):
            value = figures.get(way, {}).get(key)
            if value is not None and limit is not None:
                if limit not in limit_s:
                    continue
                scale = figures[way]["file_bytes"] / state_bytes if per_byte else 1.0
                value /= limit_s[limit] * scale
            values.append(value)
        return spread(values)

    row: dict[str, Any] = {
        "blocked_s": over("blocked_s"),
        "blocked / copy": over("blocked_s", "copy_s"),
        "returned_s": over("returned_s"),
        "safe_s": over("safe_s"),
        "durable_s": over("durable_s"),
        "durable / write": over("durable_s", "write_s", per_byte=True),
        "durable / bare write beside": spread(_beside_bare(figures, way) for figures in rounds),
        "slower": spread(_ratio(figures.get(way, {}), "step_during_s", "step_before_s") for figures in rounds),
        "lost_s": over("lost_s"),
        "load_s": over("load_s"),
        "load / read": over("load_s", "read_s", per_byte=True),
        "file_bytes": first[way]["file_bytes"],
    }
    for key in first[way]:
        if key.startswith("load_on_"):
            row[key] = over(key)
            row[f"{key} / load_s"] = spread(_ratio(figures.get(way, {}), key, "load_s") for figures in rounds)
    for key in ("blocked_s", "durable_s"):
        row[f"first {key}"] = first[way][key]
        row[f"first {key} / median"] = first[way][key] / row[key]["median"] if row[key] else None
    extra = first[way].get("extra_bytes")
    if extra is not None:
        row["extra / state"] = extra / state_bytes
    return row


def _ratio(figures: dict[str, Any], above: str, below: str) -> float | None:
    return figures[above] / figures[below] if above in figures and below in figures else None


def _beside_bare(figures: Round, way: str) -> float | None:
    """Of as many bytes, both written while training goes on."""
    if way == BARE or "step_during_s" not in figures.get(way, {}) or BARE not in figures:
        return None
    own, bare = figures[way], figures[BARE]
    return float(own["durable_s"] / bare["durable_s"] * bare["file_bytes"] / own["file_bytes"])


def goals(cases: list[dict[str, Any]], every_dcp: Iterable[str]) -> list[dict[str, Any]]:
    """Each goal, what was measured for it in each case, and whether it was met there."""
    dcp = tuple(every_dcp)

    def of(way: str, key: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda rows: _median(rows.get(way, {}).get(key))

    def beside_dcp(way: str, key: str) -> Callable[[dict[str, Any]], float | None]:
        def ratio(rows: dict[str, Any]) -> float | None:
            peers = [value for each in dcp if (value := _median(rows.get(each, {}).get(key))) is not None]
            own = _median(rows.get(way, {}).get(key))
            return None if own is None or not peers else own / min(peers)

        return ratio

    def worst(*parts: Callable[[dict[str, Any]], float | None]) -> Callable[[dict[str, Any]], float | None]:
        return lambda rows: max((value for part in parts if (value := part(rows)) is not None), default=None)

    def moved(rows: dict[str, Any]) -> float | None:
        row = rows.get("cfe", {})
        return max((_median(row[key]) or 0 for key in row if key.endswith(" / load_s")), default=None)

    def memory(way: str) -> Callable[[dict[str, Any]], float | None]:
        def ratio(rows: dict[str, Any]) -> float | None:
            extra = rows.get(way, {}).get("extra / state")
            return None if extra is None else (1 + extra) / 2

        return ratio

    asynchronous = ("cfe-async", "cfe-overlap")
    table: list[tuple[str, float, Callable[[dict[str, Any]], float | None]]] = [
        ("training blocked / copy", 1.15, of("cfe-async", "blocked / copy")),
        ("the same, copy overlapped", 0.15, of("cfe-overlap", "blocked / copy")),
        *((f"durable / write, {way}", 1.15, of(way, "durable / write")) for way in asynchronous),
        *(
            (f"durable / bare write beside, {way}", 1.15, of(way, "durable / bare write beside"))
            for way in asynchronous
        ),
        *((f"durable / best DCP async, {way}", 0.5, beside_dcp(way, "durable_s")) for way in asynchronous),
        ("synchronous save / write", 1.1, of("cfe", "durable / write")),
        *((f"steps slower, {way}", 1.2, of(way, "slower")) for way in asynchronous),
        *((f"time lost / best DCP async, {way}", 0.25, beside_dcp(way, "lost_s")) for way in asynchronous),
        *(
            (f"first save / median, {way}", 1.2, worst(*(of(way, f"first {key} / median") for key in _FIRST)))
            for way in asynchronous
        ),
        ("load / cold read", 1.1, of("cfe", "load / read")),
        ("load on other ranks / load", 2.0, moved),
        *((f"peak memory / state and staging, {way}", 1.05, memory(way)) for way in asynchronous),
    ]
    found = []
    for name, most, measure in table:
        measured = {case["name"]: measure(case["summary"]) for case in cases if not case["zero"] and case["summary"]}
        there = {where: value for where, value in measured.items() if value is not None}
        if there:
            met = [where for where, value in there.items() if value <= most]
            found.append({"goal": name, "at_most": most, "measured": there, "met": len(met), "of": len(there)})
    return found


_FIRST = ("blocked_s", "durable_s")


def _median(value: Any) -> float | None:
    return value["median"] if isinstance(value, dict) else value
