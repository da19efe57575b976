"""Slurm's queue: one squeue call for any number of jobs, asked no more often than a site likes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

from cfe_hpc.caches import forget, recall, remember
from cfe_hpc.errors import ConfigError, SchedulerError
from cfe_hpc.files import read_toml
from cfe_hpc.launch.states import JobState, run_state
from cfe_hpc.process import CommandError, run
from cfe_hpc.runfolder import RunFolder

__all__ = ["cluster_key", "forget_queue", "job_states", "parse", "poll_interval_s", "queue"]

# Unlike --json and --Format, -o prints the same on all versions and cuts nothing off. The reason comes last: it is
# the one field that may hold anything.
_FORMAT = "%i|%T|%S|%N|%r"
_ACCOUNTED = "JobID,State,NodeList"
_TIMEOUT_S = 60.0
_ENDED_AGE_S = 86_400.0
_POLL_INTERVAL_S = 10.0

Row = dict[str, Any]
"""A JobState as JSON has it."""

_MOST_IDS = 2000
"""One argument of a program may have 128 KiB; beyond so many ids all of the user's jobs are asked for."""


def job_states(scheduler: str, jobs: Sequence[dict[str, Any]], *, max_age_s: float) -> dict[str, JobState]:
    """Job id to state of the records of control/job, for those that the scheduler still knows, or its accounting does.

    Args:
        scheduler: "slurm" or "local", of all of them.
        max_age_s: an answer of Slurm's this old will do.

    Raises:
        SchedulerError: it gives no answer.
    """
    if scheduler == "slurm":
        return queue((str(job["job_id"]) for job in jobs), max_age_s=max_age_s, accounting=True)
    from cfe_hpc.launch.backend import backend_for

    return backend_for(scheduler).states(jobs)


def queue(job_ids: Iterable[str], *, max_age_s: float = 0.0, accounting: bool = False) -> dict[str, JobState]:
    """What Slurm knows of the jobs, by job id; those it has forgotten are left out. No ids: no call.

    An array that is asked for by its own number is there as a whole, and each of its tasks under `<array>_<index>`.

    Args:
        max_age_s: an answer this old will do; 0 asks anew.
        accounting: ask sacct, where there is one, about jobs that squeue has forgotten. It is asked once about each.

    Raises:
        SchedulerError: squeue is missing or the scheduler gives no answer.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    known = _of(wanted, _known(wanted, max_age_s))
    if accounting:
        known = {**_of(wanted, _accounted(sorted(wanted - known.keys()), max_age_s)), **known}
    return {job_id: JobState(**row) for job_id, row in known.items()}


def _of(wanted: set[str], rows: dict[str, Row]) -> dict[str, Row]:
    if any("_" in job_id for job_id in rows):
        from cfe_hpc.ranks.array_states import expanded  # late: few jobs are arrays

        return expanded(rows, wanted)
    return {job_id: row for job_id, row in rows.items() if job_id in wanted}


def poll_interval_s(folder: RunFolder) -> float:
    """The shortest time between two calls that the run's site wants, as frozen with the run."""
    try:
        return float(read_toml(folder.run_toml)["site"]["slurm"]["poll_interval"])
    except (ConfigError, KeyError, TypeError, ValueError):  # that it has none, or is broken, is for others to say
        return _POLL_INTERVAL_S


def forget_queue() -> None:
    """What was asked a moment ago no longer holds: a job was sent, ended or released. Verbs that do so call it."""
    forget(_name("squeue"))


def cluster_key() -> str:
    """A word for the cluster that Slurm's commands speak to, as part of a file's name."""
    conf = os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")
    try:
        written_ns = os.stat(conf).st_mtime_ns
    except OSError:  # clusters without one exist: their daemons hand it out
        written_ns = 0
    facts = [conf, str(written_ns), os.environ.get("SLURM_CLUSTERS", ""), shutil.which("squeue") or ""]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def parse(printed: str) -> dict[str, JobState]:
    """The jobs in squeue's output."""
    jobs = {}
    for line in printed.splitlines():
        job_id, word, start, nodes, reason = [field.strip() for field in line.split("|", 4)]
        reason = "" if reason == "None" else reason
        jobs[job_id] = JobState(
            job_id=job_id,
            state=run_state(word, reason),
            word=word,
            reason=reason,
            nodes=nodes,
            start=None if start in ("N/A", "") else start,
        )
    return jobs


def _name(program: str) -> str:
    return f"{program}-v1-{cluster_key()}.json"  # another number when a row has other fields


def _known(wanted: set[str], max_age_s: float) -> dict[str, Row]:
    """Rows of the jobs that squeue knows: those of an answer that is young enough and was about all that are wanted,
    or of a new one."""
    kept = recall(_name("squeue"), max_age_s=max_age_s) or {"asked": [], "jobs": {}}
    if wanted <= set(kept["asked"]):
        return dict(kept["jobs"])
    ids = sorted(wanted.union(kept["asked"]))
    jobs = _squeue(ids)
    if max_age_s > 0:
        remember(_name("squeue"), {"asked": ids, "jobs": jobs})
    return jobs


def _accounted(job_ids: list[str], max_age_s: float) -> dict[str, Row]:
    """Rows of jobs that squeue has forgotten, by accounting, where there is any. How a job ended does not change."""
    if not job_ids or shutil.which("sacct") is None:
        return {}
    ended: dict[str, Row] = recall(_name("sacct"), max_age_s=_ENDED_AGE_S) or {}
    asked = recall(_name("sacct-asked"), max_age_s=max_age_s) or {"ids": []}
    unknown = [job_id for job_id in job_ids if job_id not in ended and job_id not in asked["ids"]]
    if unknown:
        ended = {**ended, **_sacct(unknown)}
        if max_age_s > 0:
            remember(_name("sacct"), ended)
            remember(_name("sacct-asked"), {"ids": unknown})
    return ended


def _row(job: JobState) -> Row:
    return {name: getattr(job, name) for name in JobState.__slots__}


def _squeue(job_ids: list[str]) -> dict[str, Row]:
    which = f"--jobs={','.join(job_ids)}" if len(job_ids) <= _MOST_IDS else f"--user={os.geteuid()}"
    argv = ["squeue", "--noheader", "--states=all", which, "-o", _FORMAT]
    try:
        # Or the indices of an array's tasks that wait are cut off after 64 characters.
        done = run(argv, timeout_s=_TIMEOUT_S, check=False, env={**os.environ, "SLURM_BITSTR_LEN": "0"})
    except CommandError as error:
        raise SchedulerError(f"{error}; ask from a machine that has Slurm's commands") from error
    # A single forgotten id is an error to squeue; several are passed over in silence.
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        said = re.sub(r"^squeue: error: ", "", (done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
        raise SchedulerError(f"squeue: gave no answer ({said}); try again when `sinfo` works")
    return {job_id: _row(job) for job_id, job in parse(done.stdout).items()}


def _sacct(job_ids: list[str]) -> dict[str, Row]:
    """How jobs ended, by sacct; empty where there is no accounting: then nobody knows, and that is no error."""
    argv = ["sacct", "-X", "-n", "-P", f"--jobs={','.join(job_ids[:_MOST_IDS])}", f"--format={_ACCOUNTED}"]
    try:
        done = run(argv, timeout_s=_TIMEOUT_S)
    except CommandError:
        return {}
    rows = {}
    for line in done.stdout.splitlines():
        job_id, word, nodes = [field.strip() for field in line.split("|", 2)]
        # What it still takes for live has ended without a word to it: squeue would know.
        if run_state(word) in ("COMPLETED", "FAILED", "CANCELLED"):
            reason = "" if run_state(word) == "CANCELLED" else f"{word.split(' ')[0]}, by accounting"
            rows[job_id] = _row(JobState(job_id=job_id, state=run_state(word), word=word, reason=reason, nodes=nodes))
    return rows
