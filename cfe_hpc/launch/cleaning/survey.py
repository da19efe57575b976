"""What has become of every run, as far as a clean-up must know: whether it has ended, how, when, and what it needs."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cfe_hpc.errors import SchedulerError
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.jobs import all_jobs, latest_attempt, records
from cfe_hpc.launch.states import JobState
from cfe_hpc.runfolder import RunFolder

__all__ = ["STATES", "Seen", "State", "parts_of", "survey"]

State = Literal["COMPLETED", "FAILED", "CANCELLED", "HELD"]
STATES: tuple[State, ...] = ("COMPLETED", "FAILED", "CANCELLED", "HELD")
"""How a run may have ended."""

_SETTLED_S = 86_400.0
"""After so long nothing goes on in the job of a run that wrote its end: it need not be asked about."""

_BEGINNING_S = 3_600.0
"""A folder without a job or a result that is younger may be just being submitted."""

_RUN_ID = re.compile(r"[A-Za-z0-9._-]+-\d{8}-\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run, or a sweep with all its tasks.

    Attributes:
        state: how it ended; None while it has not, or nobody can tell.
        why: it cannot be called ended; "" when it can.
        since_s: its last sign of life, in seconds since the epoch.
        needs: ids of other runs that it was submitted with the names of: those that it follows or reads from. Those of
            runs that have ended for good are not looked up.
    """

    folder: RunFolder
    state: State | None
    why: str
    since_s: float
    needs: frozenset[str]


def survey(folders: Iterable[RunFolder], *, now_s: float) -> tuple[list[Seen], list[str]]:
    """Look at every run; each scheduler is asked once, about all those whose folder does not say that they ended.

    Returns:
        The runs, in their order, and what schedulers said that gave no answer. Their runs have not ended, for all that
        is known.
    """
    runs = [(folder, parts_of(folder)) for folder in folders]
    jobs = [job for _, parts in runs for part in parts if _in_question(part, now_s) for job in _jobs(part)]
    states, failures = _ask(jobs)
    return [_seen(folder, parts, states, now_s) for folder, parts in runs], failures


def parts_of(folder: RunFolder) -> list[RunFolder]:
    """The folder itself, and those of its tasks that have started."""
    return [folder, *folder.tasks()]


def _jobs(folder: RunFolder) -> list[dict[str, Any]]:
    """Those of the run, and what exports its weights when it has completed."""
    return [*records(folder, "export"), *all_jobs(folder)]


def _in_question(folder: RunFolder, now_s: float) -> bool:
    try:
        return now_s - os.stat(folder.result_path).st_mtime < _SETTLED_S
    except OSError:
        return True


def _ask(jobs: Sequence[dict[str, Any]]) -> tuple[dict[str, JobState], list[str]]:
    states: dict[str, JobState] = {}
    failures = []
    for scheduler in dict.fromkeys(str(job["scheduler"]) for job in jobs):
        asked = [job for job in jobs if job["scheduler"] == scheduler]
        try:
            states.update(backend_for(scheduler).states(asked))
        except SchedulerError as error:
            failures.append(str(error))
            for job in asked:
                job_id, reason = str(job["job_id"]), "the scheduler gave no answer"
                states[job_id] = JobState(job_id=job_id, state="UNKNOWN", word="", reason=reason)
    return states, failures


def _seen(folder: RunFolder, parts: Sequence[RunFolder], states: dict[str, JobState], now_s: float) -> Seen:
    since_s = max(map(_last_sign_s, parts))
    found = [_state(part, states, now_s - since_s) for part in parts]
    own = found[1:] if len(found) > 1 and found[0][1] == "" else found  # a sweep's folder has no result of its own
    why = next((why for _, why in own if why), "")
    ended = [state for state, _ in own if state is not None]
    state = None if why else max(ended, key=STATES.index)
    needs: frozenset[str] = frozenset()
    if state in (None, "HELD"):
        needs = _mentioned(folder)
    return Seen(folder=folder, state=state, why=why, since_s=since_s, needs=needs)


def _state(folder: RunFolder, states: dict[str, JobState], age_s: float) -> tuple[State | None, str]:
    """(how the run ended, why it has not)."""
    jobs = _jobs(folder)
    result = (folder.result() or {}).get("state")
    known = [found for job in jobs if (found := states.get(str(job["job_id"]))) is not None]
    for job in known:
        if job.state in ("PENDING", "RUNNING", "HELD"):
            return None, f"its job {job.job_id} is {job.state.lower()}"
    if result in STATES:
        return result, ""
    for job in known:
        if job.state == "UNKNOWN":
            return None, job.reason or f"its job {job.job_id} is {job.word}"
    if not jobs and age_s < _BEGINNING_S and folder.sweep_task is None:
        return None, "it may be just being submitted"
    if folder.promised("held") is not None:
        return "HELD", ""
    never = folder.promised("cancel") is not None or (jobs and latest_attempt(folder) is None)
    return ("CANCELLED" if never else "FAILED"), ""


def _last_sign_s(folder: RunFolder) -> float:
    signs_s = []
    for path in (folder.path, folder.control, folder.result_path, folder.events_path, folder.heartbeat_path):
        with contextlib.suppress(OSError):
            signs_s.append(os.stat(path).st_mtime)
    return max(signs_s, default=0.0)


def _mentioned(folder: RunFolder) -> frozenset[str]:
    """Ids of runs anywhere in run.toml: what it follows, and the folders that its command and parameters name."""
    try:
        text = folder.run_toml.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(_RUN_ID.findall(text)) - {folder.run_id}
