"""Job arrays for the tasks of a sweep: as few as the site's highest index allows, each sent by one sbatch.

A task's number is its index plus the offset of its array, whatever is sent again later: Slurm knows indices, users know
numbers, and the records in control/ know both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import SchedulerError
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.array_states import ranges
from cfe_hpc.ranks.avoiding import exclude_option
from cfe_hpc.ranks.successor import clean_environment, record_job, sbatch
from cfe_hpc.runfolder import RunFolder

__all__ = ["Array", "array_max", "arrays", "send_tasks"]

_TIMEOUT_S = 30.0
_DEFAULT_MAX = 1001
"""Slurm's own MaxArraySize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """One job array.

    Attributes:
        offset: a task's number less its index.
        tasks: their numbers, in order.
        throttle: how many of them may run at once; None without a limit.
        waits: it starts when the array before it has ended: fewer tasks may run at once than there are arrays.
    """

    offset: int
    tasks: tuple[int, ...]
    throttle: int | None = None
    waits: bool = False

    @property
    def option(self) -> str:
        """As sbatch takes it."""
        limit = "" if self.throttle is None else f"%{self.throttle}"
        return f"--array={ranges(task - self.offset for task in self.tasks)}{limit}"


def arrays(tasks: Iterable[int], *, array_max: int, max_parallel: int | None) -> list[Array]:
    """Tasks as arrays whose indices stay below `array_max`.

    Where they are several, a throttle is divided among them by their sizes, each having one at least; where it is
    smaller than their number, they start one after the other.
    """
    blocks: dict[int, list[int]] = {}
    for task in sorted(set(tasks)):
        blocks.setdefault(task // array_max, []).append(task)
    if max_parallel is None:
        limits: list[int | None] = [None] * len(blocks)
    elif max_parallel < len(blocks):
        limits = [max_parallel] * len(blocks)
    else:
        limits = list(_shares([len(block) for block in blocks.values()], max_parallel))
    waits = max_parallel is not None and max_parallel < len(blocks)
    return [
        Array(offset=number * array_max, tasks=tuple(block), throttle=limit, waits=waits and position > 0)
        for position, ((number, block), limit) in enumerate(zip(blocks.items(), limits, strict=True))
    ]


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` divided by `sizes`, at least 1 each; what rounding leaves goes where most is missing."""
    exact = [size * total / sum(sizes) for size in sizes]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        candidates = [index for index, share in enumerate(shares) if share + step >= 1]
        shares[max(candidates, key=lambda index: step * (exact[index] - shares[index]))] += step
    return shares


def array_max(spec: RunSpec) -> int:
    """How many indices an array may have: as the profile says, else as Slurm says."""
    stated = spec.site.slurm.array_max
    if stated is not None:
        return stated
    try:
        shown = run(["scontrol", "show", "config"], timeout_s=_TIMEOUT_S).stdout
    except CommandError:
        return _DEFAULT_MAX
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return int(match[1]) if match else _DEFAULT_MAX


def send_tasks(spec: RunSpec, sweep: RunFolder, tasks: Iterable[int], *, options: Sequence[str] = ()) -> list[str]:
    """Send tasks of a sweep by its submission.sh, and record the arrays in its control/.

    Args:
        options: further options of sbatch.

    Returns:
        The arrays' job ids.

    Raises:
        SchedulerError: one was refused; those before it are cancelled.
    """
    size = array_max(spec)
    if size < 2:
        raise SchedulerError("sbatch: this site takes no job arrays (MaxArraySize); submit the runs one by one")
    assert spec.job.sweep is not None
    options = [*options, *exclude_option(sweep, spec.plan)]
    sent: list[str] = []
    for array in arrays(tasks, array_max=size, max_parallel=spec.job.sweep.max_parallel):
        environment = clean_environment(os.environ) | {"CFE_SWEEP_OFFSET": str(array.offset)}
        waits = [f"--dependency={_with(options, f'afterany:{sent[-1]}')}"] if array.waits else []
        try:
            job_id = sbatch(sweep, sweep.submission_script, environment, [*options, *waits, array.option])
        except SchedulerError:
            for other in sent:
                run(["scancel", other], timeout_s=_TIMEOUT_S, check=False)
            raise
        sent.append(job_id)
        record_job(
            sweep, job_id=job_id, scheduler="slurm", attempt_base=0, offset=array.offset, tasks=ranges(array.tasks)
        )
    return sent


def _with(options: Sequence[str], dependency: str) -> str:
    """A dependency beside the one that is among the options: of two, sbatch heeds the last."""
    given = [option.partition("=")[2] for option in options if option.startswith("--dependency=")]
    return ",".join([*given, dependency])
