"""What state a run is in, from its folder and one word of the scheduler's."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.files import ndjson_record
from cfe_hpc.recovery.attempts import Attempt, read_attempts
from cfe_hpc.recovery.ledger import Summary, summarise
from cfe_hpc.recovery.upstream import in_vain, unfinished, upstream
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["RunState", "RunStatus", "SchedulerWord", "is_settled", "read_status"]

RunState = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "HELD"]

_TAILS_BYTES = (4 * 1024, 64 * 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerWord:
    """What the scheduler says of a run's newest job.

    Attributes:
        state: a run state, or UNKNOWN when it has a word that says nothing, or could not be asked.
        reason: in its own words; "" when it gives none.
        nodes: as it spells them; "" while there are none.
    """

    state: str
    reason: str = ""
    nodes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One run, as `status --json` prints it: its keys are this class's fields, in this order.

    Attributes:
        attempt: number of the newest attempt, from 0; None before the first.
        step: steps done; None before the first attempt.
        lost_steps: steps done and done again, so far.
        goodput: time of steps that count ÷ time allocated; None while no step is timed.
        heartbeat_age_s: seconds since the last heartbeat; None before the first.
        reason: why the run is where it is, where somebody knows.
        buckets: seconds by recovery.buckets.Bucket; empty where heartbeats do not tell where time went.
    """

    run_id: str
    state: RunState
    job_id: str | None
    attempt: int | None
    step: int | None
    total_steps: int | None
    lost_steps: int
    goodput: float | None
    heartbeat_age_s: float | None
    reason: str
    run_dir: str
    buckets: dict[str, float]


def is_settled(folder: RunFolder) -> bool:
    """Whether the folder alone tells the state: the run has ended, or is held."""
    return folder.result() is not None or folder.promised("held") is not None


def read_status(
    folder: RunFolder, *, job_id: str | None, word: SchedulerWord | None, books: Summary | None = None
) -> RunStatus:
    """The run's status now. Reads heartbeat.ndjson whole only for runs that have not ended.

    Args:
        job_id: of the newest job, from its record; None when the run was never submitted.
        word: the scheduler's about that job; None when it knows no such job (or needed no asking).
        books: of a run that has not ended, where they are known.
    """
    result = folder.result()
    attempts = read_attempts(folder.events())
    newest = attempts[-1] if attempts else None
    state, reason = _settled(result, folder) or _unsettled(folder, newest, job_id, word)
    if result is not None:
        step, lost, goodput = result.get("final_step"), result.get("lost_steps", 0), result.get("goodput")
        buckets = result.get("buckets") or {}
    else:
        books = summarise(folder) if books is None else books
        step, lost, goodput = (books.last_step if attempts else None), books.lost_steps, books.goodput
        buckets = books.buckets
    return RunStatus(
        run_id=folder.run_id,
        state=state,
        job_id=job_id or next((a.job_id for a in reversed(attempts) if a.job_id), None),
        attempt=newest.number if newest else None,
        step=step,
        total_steps=next((a.total_steps for a in reversed(attempts) if a.total_steps is not None), None),
        lost_steps=lost,
        goodput=goodput,
        heartbeat_age_s=_heartbeat_age_s(folder.heartbeat_path),
        reason=reason,
        run_dir=str(folder.path),
        buckets=buckets,
    )


def _settled(result: Mapping[str, Any] | None, folder: RunFolder) -> tuple[RunState, str] | None:
    if result is not None and result.get("state") in ("COMPLETED", "FAILED", "CANCELLED", "HELD"):
        return result["state"], str(result.get("reason") or "")
    held = folder.promised("held")
    return None if held is None else ("HELD", str(held.get("reason") or ""))


def _unsettled(
    folder: RunFolder, newest: Attempt | None, job_id: str | None, word: SchedulerWord | None
) -> tuple[RunState, str]:
    """The state of a run whose folder does not say how it ended."""
    if job_id is None:
        return _never_submitted(newest)
    following = _following(folder, word) if newest is None else None
    if following is not None:
        return following
    if word is None:
        word = SchedulerWord(state="GONE", reason=f"vanished: the scheduler no longer knows job {job_id}")
    if word.state == "UNKNOWN":
        return ("PENDING" if newest is None else "RUNNING"), word.reason
    if word.state in ("PENDING", "RUNNING", "HELD"):
        return word.state, word.reason  # type: ignore[return-value]
    # The job is over and nobody wrote a result: cancelled while it waited, killed whole, or its node died.
    if word.state == "CANCELLED" or folder.promised("cancel") is not None:
        return "CANCELLED", word.reason
    ended = word.reason or f"the job ended ({word.state})"
    error = f"; {newest.error}" if newest and newest.error else ""
    return "FAILED", f"{ended}, and left no result{error}"


def _following(folder: RunFolder, word: SchedulerWord | None) -> tuple[RunState, str] | None:
    """The state of a run that has not begun and is to follow others; None of any other, and when they do not matter."""
    if not upstream(folder) or folder.promised("cancel") is not None:
        return None
    if word is None or word.state not in ("PENDING", "RUNNING", "HELD", "UNKNOWN"):
        return "CANCELLED", in_vain(folder) or "never started: what it waited for did not complete"
    waiting = unfinished(folder)
    if not waiting or word.state not in ("PENDING", "RUNNING"):
        return None
    return "PENDING", in_vain(folder) or f"waits for {', '.join(waiting)}"  # on this machine something runs that waits


def _never_submitted(newest: Attempt | None) -> tuple[RunState, str]:
    """A script that joined by hand (its job id holds its process id), or a submission that broke off."""
    if newest is None:
        return "FAILED", "never submitted: there is no job, and no attempt"
    alone = re.fullmatch(r"alone-(\d+)", newest.job_id or "")
    if alone is None or newest.host != socket.gethostname():
        return "RUNNING", f"started by hand on {newest.host}; nobody here can tell whether it still runs"
    try:
        os.kill(int(alone.group(1)), 0)
    except ProcessLookupError:
        return "FAILED", f"vanished: process {alone.group(1)} ended and left no result"
    except PermissionError:
        pass
    return "RUNNING", ""


def _heartbeat_age_s(path: Path) -> float | None:
    """Age of the last whole line; only the file's end is read, and of that no more lines than it takes."""
    for last_bytes in _TAILS_BYTES:
        for line in reversed(_tail(path, last_bytes)):
            last_s = epoch_s((ndjson_record(line) or {}).get("time"))
            if last_s is not None:
                return round(max(0.0, time.time() - last_s), 1)
    return None


def _tail(path: Path, last_bytes: int) -> list[bytes]:
    """The lines at the end of a file, the first one perhaps cut; none where there is no file."""
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - last_bytes))
            return stream.read().split(b"\n")
    except FileNotFoundError:
        return []
