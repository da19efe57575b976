"""Events and heartbeats of a run, as ranks write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

Events = list[dict[str, Any]]


def stamp(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"2026-01-31T10:{int(minutes):02d}:{rest:06.3f}Z"


ZERO = epoch_s(stamp(0)) or 0.0


def started(number: int, at: float, *, allocated: float, startup: float = 2.0, restart: int = 0) -> dict[str, Any]:
    detail = {"total_steps": 100, "startup_seconds": startup, "allocated_s": ZERO + allocated, "restart": restart}
    return {"event": "started", "attempt": number, "time": stamp(at), "detail": detail}


def line(number: int, done: int, at: float, /, **spent: float) -> dict[str, Any]:
    return {"time": stamp(at), "attempt": number, "step": done, "step_seconds": 1.0, "spent": spent}


def attempt(
    number: int, *, resumed: int | None, saved: int | None, reason: str | None, error: str | None = None
) -> Events:
    """One attempt's events: steps it resumed from and saved, why it was requeued (None: it was not)."""
    events: Events = [{"event": "started", "attempt": number, "detail": {"job_id": "7", "total_steps": 100}}]
    if resumed is not None:
        events.append({"event": "resumed", "attempt": number, "step": resumed})
    if saved is not None:
        events.append({"event": "checkpoint_saved", "attempt": number, "step": saved})
    if error is not None:
        events.append({"event": "failed", "attempt": number, "reason": error, "rank": 1, "host": "n1"})
    if reason is not None:
        events.append({"event": "requeued", "attempt": number, "reason": reason})
    return events


def write_run(path: Path, events: Events, beats: Events) -> RunFolder:
    folder = RunFolder(path)
    folder.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    folder.heartbeat_path.write_text("".join(json.dumps(beat) + "\n" for beat in beats))
    return folder


def beat(number: int, step: int, at: float, seconds: float = 1.0) -> dict[str, Any]:
    return {"time": stamp(at), "attempt": number, "step": step, "step_seconds": seconds}
