"""Slurm's queue: one squeue call for any number of jobs, with the fields spelt out."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cfe_hpc.errors import SchedulerError
from cfe_hpc.launch.states import JobState, run_state
from cfe_hpc.process import CommandError, run

__all__ = ["parse", "queue"]

# Unlike --json and --Format, -o prints the same on all versions and cuts nothing off. The reason comes last: it is
# the one field that may hold anything.
_FORMAT = "%i|%T|%S|%N|%r"
_TIMEOUT_S = 60.0


def queue(job_ids: Iterable[str]) -> dict[str, JobState]:
    """What squeue knows of the jobs, by job id; those it has forgotten are left out. No ids: no call.

    Raises:
        SchedulerError: squeue is missing or the scheduler gives no answer.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    argv = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(wanted)}", "-o", _FORMAT]
    try:
        done = run(argv, timeout_s=_TIMEOUT_S, check=False)
    except CommandError as error:
        raise SchedulerError(f"{error}; ask from a machine that has Slurm's commands") from error
    # A single forgotten id is an error to squeue; several are passed over in silence.
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        said = re.sub(r"^squeue: error: ", "", (done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
        raise SchedulerError(f"squeue: gave no answer ({said}); try again when `sinfo` works")
    return parse(done.stdout)


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
