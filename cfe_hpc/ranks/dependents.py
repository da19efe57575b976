"""Jobs that wait for another in Slurm's queue, and what keeps them waiting when a successor takes that one's place.

A requeued job keeps its id, and so its dependents. A successor is another job: to Slurm, its predecessor has ended,
well or not, and what waits would start too early, or never. So whoever sends the successor moves them, while the
predecessor still runs.
"""

from __future__ import annotations

import os
import re

from cfe_hpc.errors import SchedulerError
from cfe_hpc.process import CommandError, run

__all__ = ["move_dependents", "moved", "waiting_for"]

_TIMEOUT_S = 30.0

# "afterok:12(unfulfilled)", also several with "," (all) or "?" (any); of an array's task "12_3". `after:` and
# `singleton` are about starts and names, which a successor changes nothing of.
_ON_END = r"(?P<kind>afterok|afterany|afternotok):{job}(?![\d_])(\([^)]*\))?"
_STATE = re.compile(r"\([^)]*\)")


def move_dependents(old: str, new: str) -> list[str]:
    """Let the user's pending jobs that wait for the end of job `old` wait for that of `new`, its successor.

    Returns:
        The jobs that were moved.

    Raises:
        CommandError: Slurm gives no answer; the call may be made again.
        SchedulerError: it refused one of them; the others have been moved.
    """
    done, refused = [], []
    for job_id, dependency in waiting_for(old).items():
        if job_id == new:
            continue
        argv = ["scontrol", "update", f"JobId={job_id}", f"Dependency={moved(dependency, old, new)}"]
        try:
            run(argv, timeout_s=_TIMEOUT_S)
            done.append(job_id)
        except CommandError as error:
            refused.append(f"job {job_id} waits for {old}, and not for its successor {new}: {error}")
    if refused:
        raise SchedulerError("\n".join(refused))
    return done


def waiting_for(job_id: str) -> dict[str, str]:
    """The user's pending jobs that wait for the end of a job: id to dependency, as squeue spells it. One call.

    Raises:
        CommandError: Slurm gives no answer.
    """
    argv = ["squeue", "--noheader", "--states=PENDING", f"--user={os.getuid()}", "-o", "%F|%E"]
    printed = run(argv, timeout_s=_TIMEOUT_S).stdout
    pattern = re.compile(_ON_END.format(job=re.escape(job_id)))
    rows = (line.strip().partition("|") for line in printed.splitlines())
    return {waiting: dependency for waiting, _, dependency in rows if pattern.search(dependency)}


def moved(dependency: str, old: str, new: str) -> str:
    """A dependency as squeue prints it, spelt as scontrol reads it, with `new` in the place of `old`."""
    pattern = re.compile(_ON_END.format(job=re.escape(old)))
    return _STATE.sub("", pattern.sub(lambda match: f"{match['kind']}:{new}", dependency))
