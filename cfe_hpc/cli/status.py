"""`status [RUN]`: states, attempts, steps, lost steps, goodput, heartbeats."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common

if TYPE_CHECKING:
    from cfe_hpc.reports.status import RunStatus, SchedulerWord
    from cfe_hpc.runfolder import RunFolder

__all__ = ["configure", "read_statuses", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "State, attempt, step, lost steps, goodput and heartbeat age of one run, or of all there are; for one also "
        "where its allocated time went. Asks the scheduler once, and only about runs that have not ended."
    )
    common.add_run_argument(parser, optional=True)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table, or the JSON list; 3 when the scheduler gave no answer, with what the folders alone tell."""
    from dataclasses import asdict

    from cfe_hpc.reports.find import runs_under

    folders = [common.find_run(args)] if args.run else sorted(runs_under(common.roots(args)), key=_submission_time)
    statuses, failures = read_statuses(folders)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if args.json:
        common.print_json([asdict(status) for status in statuses])
    else:
        sys.stdout.write(_table(statuses) if statuses else "no runs here; `cfe-hpc submit JOB` makes one\n")
        if args.run and statuses[0].buckets:
            sys.stdout.write(_times(statuses[0].buckets))
    return 3 if failures else 0


def _submission_time(folder: RunFolder) -> str:
    """The stamp in the run id: YYYYMMDD-HHMMSS-xxxx."""
    return folder.run_id[-20:]


def read_statuses(folders: Sequence[RunFolder]) -> tuple[list[RunStatus], list[str]]:
    """(the runs' statuses, what the schedulers that gave no answer said)."""
    from cfe_hpc.launch.jobs import latest_job
    from cfe_hpc.reports.status import is_settled, read_status

    jobs = {folder.path: latest_job(folder) for folder in folders}
    asked: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        job = jobs[folder.path]
        if job is not None and not is_settled(folder):
            asked.setdefault(str(job["scheduler"]), []).append(job)
    words, failures = _ask(asked)
    statuses = []
    for folder in folders:
        job = jobs[folder.path]
        job_id = None if job is None else str(job["job_id"])
        statuses.append(read_status(folder, job_id=job_id, word=words.get(job_id or "")))
    return statuses, failures


def _ask(asked: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, SchedulerWord], list[str]]:
    """Every scheduler's word on its jobs: one call each."""
    from cfe_hpc.errors import SchedulerError
    from cfe_hpc.launch.backend import backend_for
    from cfe_hpc.reports.status import SchedulerWord

    words: dict[str, SchedulerWord] = {}
    failures = []
    for scheduler, jobs in asked.items():
        try:
            states = backend_for(scheduler).states(jobs)
        except SchedulerError as error:
            failures.append(str(error))
            silent = SchedulerWord(state="UNKNOWN", reason="the scheduler gave no answer")
            words.update((str(job["job_id"]), silent) for job in jobs)
            continue
        words.update((job_id, SchedulerWord(state=job.state, reason=job.reason)) for job_id, job in states.items())
    return words, failures


_HEADINGS = ("RUN", "STATE", "JOB", "ATTEMPT", "STEP", "LOST", "GOODPUT", "HEARTBEAT", "REASON")


def _table(statuses: Sequence[RunStatus]) -> str:
    rows = [_HEADINGS, *(_row(status) for status in statuses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def _row(status: RunStatus) -> tuple[str, ...]:
    from cfe_hpc.units import format_duration

    age_s = status.heartbeat_age_s
    total = "" if status.total_steps is None else f"/{status.total_steps}"
    return (
        status.run_id,
        status.state,
        status.job_id or "-",
        "-" if status.attempt is None else str(status.attempt),
        "-" if status.step is None else f"{status.step}{total}",
        str(status.lost_steps),
        "-" if status.goodput is None else f"{status.goodput:.1%}",
        "-" if age_s is None else f"{format_duration(age_s)} ago",
        status.reason.splitlines()[0][:100] if status.reason else "",
    )


def _times(buckets: Mapping[str, float]) -> str:
    """Where the time went: a line for each bucket that holds any, with its share of the allocated time."""
    held_s = sum(seconds for bucket, seconds in buckets.items() if bucket != "queue")
    rows = [("TIME", "SECONDS", "OF ALLOCATED")]
    for bucket, seconds in [*buckets.items(), ("allocated", held_s)]:
        share = "" if bucket == "queue" or not held_s else f"{seconds / held_s:.1%}"
        if seconds:
            rows.append((bucket, f"{seconds:.1f}", share))
    lines = (f"{name:<10}  {seconds:>10}  {share:>12}".rstrip() for name, seconds, share in rows)
    return "\n" + "\n".join(lines) + "\n"
