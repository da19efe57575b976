"""Following a run to its end from the login node: its own journal first, the scheduler now and then."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cfe_hpc.config.run import RunSpec
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.jobs import latest_attempt, latest_job
from cfe_hpc.recovery.upstream import in_vain
from cfe_hpc.runfolder import RunFolder

__all__ = ["describe", "follow"]

_LOOK_EVERY_S = 0.5
_PROGRESS_EVERY_S = 10.0
_GONE_LOOKS = 2
"""A job may be missing from one answer, between its end and the record of what follows; not from two."""


def follow(folder: RunFolder, spec: RunSpec, say: Callable[[str], None]) -> str:
    """Wait until the run has ended or is held.

    Args:
        say: gets a line for every event, and for the newest heartbeat every ten seconds.

    Returns:
        The run's state: COMPLETED, FAILED, CANCELLED or HELD. When its job is gone without a result: CANCELLED if
        that was asked for, or it was to follow a run that ended badly, else FAILED.
    """
    told, gone, asked_s, beat_s = 0, 0, time.monotonic(), time.monotonic()
    while True:
        result = folder.result()
        told = _tell_events(folder, told, say)
        if result is not None:
            return str(result.get("state", "FAILED"))
        now_s = time.monotonic()
        if now_s - beat_s >= _PROGRESS_EVERY_S:
            beat_s = now_s
            _tell_heartbeat(folder, say)
        if now_s - asked_s >= spec.site.slurm.poll_interval:
            asked_s = now_s
            gone = gone + 1 if _is_gone(folder, spec) else 0
        if gone >= _GONE_LOOKS and folder.result() is None:
            vain = in_vain(folder) if latest_attempt(folder) is None else None
            say(vain or "its job is gone, and left no result; see the run's logs")
            return "FAILED" if folder.promised("cancel") is None and vain is None else "CANCELLED"
        time.sleep(_LOOK_EVERY_S)


def describe(event: dict[str, Any]) -> str:
    """An event for people, on one line."""
    words = [str(event.get("time", ""))[11:19], str(event.get("event"))]
    words += [f"{name} {event[name]}" for name in ("attempt", "step", "rank") if event.get(name) is not None]
    words += [str(event["reason"])] if event.get("reason") else []
    return " ".join(words).replace("\n", "\\n")


def _tell_events(folder: RunFolder, told: int, say: Callable[[str], None]) -> int:
    events = list(folder.events())
    for event in events[told:]:
        say(describe(event))
    return len(events)


def _tell_heartbeat(folder: RunFolder, say: Callable[[str], None]) -> None:
    newest = next(iter(deque(folder.heartbeats(), maxlen=1)), None)
    if newest is not None:
        loss = f" loss {newest['loss']:.4g}" if isinstance(newest.get("loss"), float) else ""
        say(f"{str(newest.get('time', ''))[11:19]} step {newest.get('step')}{loss}")


def _is_gone(folder: RunFolder, spec: RunSpec) -> bool:
    """Whether nothing runs or waits any more for the run."""
    job = latest_job(folder)
    if job is None:
        return True
    known = backend_for(spec.site.scheduler).states([job]).get(str(job["job_id"]))
    return known is None or known.state in ("COMPLETED", "FAILED", "CANCELLED")
