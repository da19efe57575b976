"""The jobs of a run, as control/job and its successors record them."""

from __future__ import annotations

from typing import Any

from cfe_hpc.ranks.jobrecords import records, unused_attempt
from cfe_hpc.runfolder import RunFolder

__all__ = ["all_jobs", "latest_attempt", "latest_job", "records", "unused_attempt"]


def all_jobs(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's jobs, oldest first: each with `job_id`, `scheduler` and `attempt_base` at least."""
    return records(folder, "job")


def latest_job(folder: RunFolder) -> dict[str, Any] | None:
    """The job that runs, waits or ended last; None when none was submitted."""
    jobs = all_jobs(folder)
    return jobs[-1] if jobs else None


def latest_attempt(folder: RunFolder) -> int | None:
    """Number of the newest attempt that started; None before the first."""
    attempts = [event["attempt"] for event in folder.events() if event.get("event") == "started"]
    return max((attempt for attempt in attempts if isinstance(attempt, int)), default=None)
