"""What Slurm says of a job before it is sent: `sbatch --test-only`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cfe_hpc.errors import SchedulerError
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.successor import clean_environment
from cfe_hpc.units import epoch_s

__all__ = ["Answer", "ask"]

_TIMEOUT_S = 20.0

_START = re.compile(r"\bto start at (\S+) using \d+ processors\b")
_LOST = re.compile(r"contact slurm|configuration (source|file)|connect|timed out|munge|authentication", re.IGNORECASE)
_PREFIX = re.compile(r"^(?:sbatch: )?(?:error: |fatal: )?(?:allocation failure: )?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Slurm's own estimate.

    Attributes:
        start_s: when the job would start, in seconds since the epoch; None when it was refused.
        refusal: sbatch's words then; "" otherwise.
    """

    start_s: float | None
    refusal: str = ""


def ask(script: str) -> Answer:
    """Ask about a job with this script; nothing is submitted.

    Raises:
        SchedulerError: sbatch is missing, or does not reach the scheduler.
    """
    try:
        done = run(
            ["sbatch", "--test-only"],
            timeout_s=_TIMEOUT_S,
            check=False,
            stdin=script,
            env=clean_environment(os.environ),
        )
    except CommandError as error:
        raise SchedulerError(f"{error}; ask from a machine that has Slurm's commands") from error
    said = [word for word in (_PREFIX.sub("", line).strip() for line in done.stderr.splitlines()) if word]
    match = _START.search(done.stderr)
    if done.returncode == 0 and match is not None:
        return Answer(start_s=epoch_s(match[1]))
    if _LOST.search(done.stderr):
        raise SchedulerError(f"sbatch: {'; '.join(said)}; check that this machine reaches the scheduler (`sinfo`)")
    return Answer(start_s=None, refusal="; ".join(dict.fromkeys(said)) or "it said nothing")
