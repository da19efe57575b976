"""Runs a way through its preemptions, and gathers what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slurm.cluster import ENDED, Cluster

from bench_goodput.ways import OURS, WAYS
from cfe_hpc.files import read_ndjson

__all__ = ["Outcome", "disturb"]

_PREEMPTION_S = 150.0
"""Most that Slurm takes from a preemption to the requeue: it looks twice a minute, and then waits for KillWait."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way's run. Times are epoch seconds unless they end in `_s` of a length.

    Attributes:
        weights: digest of the final weights; None when the last step was not reached.
        attempts: start and end of each allocation as Slurm accounts for them, whole seconds.
        steps: number of every step in the order in which they were done, those done again included.
        starts_s: process start to first step, of each attempt after the first that trained.
        commits_s: first signal to committed checkpoint, of each preemption (ours only).
    """

    way: str
    weights: str | None
    attempts: list[tuple[float, float]]
    steps: list[int]
    starts_s: list[float]
    commits_s: list[float]

    @property
    def allocated_s(self) -> float:
        return sum(end - start for start, end in self.attempts)


def disturb(
    cluster: Cluster, way: str, folder: Path, *, preemptions_s: Sequence[float], steps: int, every: int
) -> Outcome:
    """Run a way from its submission to its end, preempted so many seconds into each allocation."""
    folder.mkdir(parents=True)
    job_id = WAYS[way](cluster, folder, steps, every)
    cluster.wait_for_state(job_id, "RUNNING")
    for seconds in preemptions_s:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s and cluster.state(job_id) not in ENDED:
            time.sleep(min(0.5, max(0.0, deadline_s - time.monotonic())))
        if cluster.state(job_id) in ENDED or not _preempt(cluster, job_id):
            break
    cluster.wait_for_end(job_id, timeout_s=600)
    finished = folder / "finished"
    lines = list(read_ndjson(folder / "steps.ndjson"))
    return Outcome(
        way=way,
        weights=finished.read_text() if finished.exists() else None,
        attempts=_allocations(cluster, job_id),
        steps=[line["step"] for line in lines],
        starts_s=[line["began_s"] - line["process_s"] for line in lines if line.get("restarts")],
        commits_s=_commits_s(folder) if way == OURS else [],
    )


def _preempt(cluster: Cluster, job_id: str) -> bool:
    """Preempt the job and let it run again; False when it has ended by itself meanwhile, in its grace at the latest."""
    before, preemptor = cluster.restarts(job_id), cluster.preempt(job_id)
    cluster.wait_for(
        lambda: cluster.restarts(job_id) > before or cluster.state(job_id) in ENDED,
        _PREEMPTION_S,
        f"job {job_id} requeued or ended",
    )
    cluster.scancel(preemptor)
    cluster.wait_for_end(preemptor)
    if cluster.state(job_id) in ENDED:
        return False
    cluster.resume(job_id)
    return True


def _allocations(cluster: Cluster, job_id: str) -> list[tuple[float, float]]:
    """Start and end of every allocation; accounting follows a few seconds behind."""

    def known() -> list[list[str]] | None:
        rows = cluster.sacct(job_id, "Start,End")
        whole = len(rows) > cluster.restarts(job_id) and "Unknown" not in [stamp for row in rows for stamp in row]
        return rows if whole else None

    rows = cluster.wait_for(known, 60, f"job {job_id} in the accounting")
    start_end = [[datetime.fromisoformat(stamp).timestamp() for stamp in row] for row in rows]
    return [(start, end) for start, end in start_end]


def _commits_s(folder: Path) -> list[float]:
    events = [event for path in folder.glob("runs/*/*/events.ndjson") for event in read_ndjson(path)]
    saved = {(event["attempt"], event["step"]): event for event in events if event["event"] == "checkpoint_saved"}
    # One that comes before the ranks can hear it has nothing to save.
    preempted = [each for each in events if each["event"] == "preempted" and each.get("seconds") is not None]
    return [_at(saved[each["attempt"], each["step"]]) - (_at(each) - each["seconds"]) for each in preempted]


def _at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()


def read_bare(folder: Path) -> list[dict[str, Any]]:
    """What bare.py has measured so far."""
    return [json.loads(line) for line in (folder / "bare.ndjson").read_text(encoding="utf-8").splitlines()]
