"""What became of a run, attempt by attempt: its report, as data and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cfe_hpc.recovery.buckets import BUCKETS, Part
from cfe_hpc.recovery.causes import CAUSES
from cfe_hpc.recovery.ledger import parts_of
from cfe_hpc.reports.status import RunStatus
from cfe_hpc.runfolder import RunFolder

__all__ = ["markdown", "read_report"]

_TOLD = ("failed", "held", "degraded", "rolled_back", "checkpoint_failed", "cancelled")
_WORDS: dict[str, str] = {row.cause: row.word for row in CAUSES}


def read_report(folder: RunFolder, status: RunStatus) -> dict[str, Any]:
    """A run's report: the keys of `status --json`, `measured` of result.json, the attempts, and the events that tell
    of trouble. Reads its events and heartbeats whole."""
    parts = parts_of(folder)
    return {
        **asdict(status),
        "measured": (folder.result() or {}).get("measured"),
        "attempts": [_attempt(part) for part in parts],
        "events": [dict(event) for event in folder.events() if event.get("event") in _TOLD],
    }


def _attempt(part: Part) -> dict[str, Any]:
    attempt, trained = part.attempt, [leg for leg in part.legs if leg.trained]
    return {
        "attempt": attempt.number,
        "restart": attempt.restart,
        "job_id": attempt.job_id,
        "hosts": list(attempt.hosts),
        "began_s": part.began_s,
        "allocated_s": round(part.allocated_s, 3),
        "first_step": trained[0].start if trained else None,
        "last_step": trained[-1].end if trained else None,
        "lost_steps": sum(leg.end - leg.kept for leg in trained),
        "ended_by": attempt.ended_by,
        "error": attempt.error,
        "buckets": {bucket: round(part.buckets.get(bucket, 0.0), 3) for bucket in BUCKETS if bucket != "queue"},
    }


def markdown(report: Mapping[str, Any]) -> str:
    """A report as one Markdown document."""
    sections = [_head(report), _attempts(report["attempts"])]
    if report["buckets"]:
        sections.append(_times(report))
    if report["measured"]:
        sections.append(_measured(report["measured"]))
    if report["events"]:
        sections.append(_events(report["events"]))
    return "\n".join(sections)


def _head(report: Mapping[str, Any]) -> str:
    total = "" if report["total_steps"] is None else f" of {report['total_steps']}"
    goodput = "not known" if report["goodput"] is None else f"{report['goodput']:.1%}"
    reason = f": {_cell(report['reason'])}" if report["reason"] else ""
    return (
        f"# {report['run_id']}\n\n"
        f"- state: {report['state']}{reason}\n"
        f"- job: {report['job_id'] or 'none'}\n"
        f"- steps: {'none' if report['step'] is None else report['step']}{total}, lost: {report['lost_steps'] or 0}\n"
        f"- goodput: {goodput}\n"
        f"- folder: `{report['run_dir']}`\n"
    )


def _attempts(attempts: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for each in attempts:
        restart = f" (restart {each['restart']})" if each["restart"] else ""
        steps = "none" if each["last_step"] is None else f"{each['first_step']} to {each['last_step']}"
        ended = str(each["ended_by"] or "")
        hosts = ", ".join(each["hosts"][:4]) + (" …" if len(each["hosts"]) > 4 else "")
        row = (f"{each['attempt']}{restart}", hosts, f"{each['allocated_s']:.1f}", steps, str(each["lost_steps"]))
        rows.append((*row, _WORDS.get(ended, ended), each["error"] or ""))
    headings = ("attempt", "nodes", "allocated (s)", "steps", "lost", "ended by", "first error")
    return "## Attempts\n\n" + _table(headings, rows)


def _times(report: Mapping[str, Any]) -> str:
    buckets = [bucket for bucket in BUCKETS if report["buckets"].get(bucket)]
    rows = []
    for each in report["attempts"]:
        name = f"attempt {each['attempt']}" + (f" (restart {each['restart']})" if each["restart"] else "")
        held = each["buckets"]
        rows.append((name, *("" if bucket == "queue" else f"{held[bucket]:.1f}" for bucket in buckets)))
    sums = report["buckets"]
    held_s = sum(seconds for bucket, seconds in sums.items() if bucket != "queue")
    rows.append(("all", *(f"{sums[bucket]:.1f}" for bucket in buckets)))
    shares = (f"{sums[bucket] / held_s:.1%}" if bucket != "queue" and held_s else "" for bucket in buckets)
    rows.append(("of allocated", *shares))
    return "## Where the time went (s)\n\n" + _table(("", *buckets), rows)


def _measured(measured: Mapping[str, Any]) -> str:
    return (
        "## Measured\n\n"
        f"- step, p95: {measured['step_p95_s']:.3g} s\n"
        f"- save, p95: {measured['save_p95_s']:.3g} s; training waited {measured['blocked_p95_s']:.3g} s of them\n"
        f"- interruptions: {measured['interruptions']} in {measured['trained_s']:.0f} s\n"
    )


def _events(events: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for event in events:
        where = " ".join(str(event[key]) for key in ("host", "rank") if event.get(key) is not None)
        what = [_flat(event[key]) for key in ("reason", "detail") if event.get(key) is not None]
        step, number = event.get("step", ""), event.get("attempt", "")
        rows.append((str(event.get("time", "")), str(number), str(event["event"]), str(step), where, ": ".join(what)))
    return "## Events\n\n" + _table(("time", "attempt", "event", "step", "host, rank", "what"), rows)


def _flat(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text as a table's cell takes it: on one line, its bars escaped, not longer than anybody reads."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    return flat if len(flat) <= 300 else f"{flat[:300]}…"
