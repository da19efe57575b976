"""`debug --attach`: a shell beside a rank of a run that runs, on its node and in its allocation."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import SchedulerError, UsageError
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.jobs import latest_job
from cfe_hpc.launch.script import imports
from cfe_hpc.launch.terminal import in_terminal
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.nodelist import expand
from cfe_hpc.ranks.successor import clean_environment
from cfe_hpc.runfolder import RunFolder

__all__ = ["Attached", "attach", "attachment"]

_SQUEUE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """How to get a shell beside a rank of a running run.

    Attributes:
        argv: what starts it in this terminal.
        node: the rank's node.
    """

    argv: tuple[str, ...]
    node: str


def attachment(folder: RunFolder, rank: int) -> Attached:
    """The way to `rank` of a run. Asks the scheduler once.

    Raises:
        UsageError: the run does not run, or has no such rank.
        SchedulerError: the scheduler gives no answer.
    """
    spec, job, result = RunSpec.read(folder.run_toml), latest_job(folder), folder.result()
    if result is not None:
        raise UsageError(f"{folder.run_id}: has ended ({result.get('state')}); see `cfe-hpc logs {folder.run_id}`")
    known = None if job is None else backend_for(str(job["scheduler"])).states([job]).get(str(job["job_id"]))
    if job is None or known is None or known.state != "RUNNING":
        told = "no job" if known is None else f"{known.state}{known.reason and ', '}{known.reason}"
        raise UsageError(f"{folder.run_id}: does not run ({told}); see `cfe-hpc status {folder.run_id}`")
    if not 0 <= rank < spec.plan.world_size:
        raise UsageError(
            f"--rank: {folder.run_id} has ranks 0 to {spec.plan.world_size - 1} ({rank}); give one of them"
        )
    words = [spec.provenance.batch_python, "-m", "cfe_hpc.ranks.attaching", str(folder.path), "--rank", str(rank)]
    # Nothing is prepared or verified: the rank that runs has its environment, and its run must not be told a failure.
    shell = ["bash", "-c", "\n".join([*imports(spec), f"exec {shlex.join(words)}"])]
    if job["scheduler"] != "slurm":
        return Attached(argv=tuple(shell), node=str(job["host"]))
    nodes = expand(known.nodes)
    node = nodes[min(rank // spec.plan.devices_per_node, len(nodes) - 1)]
    step = [
        "srun",
        f"--jobid={_plain_id(str(job['job_id']))}",
        "--overlap",
        "--pty",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
    ]
    return Attached(argv=(*step, "--export=ALL", *shell), node=node)


def _plain_id(job_id: str) -> str:
    """The number that srun knows a job by: a task of an array has one of its own."""
    if job_id.isdecimal():
        return job_id
    try:
        return run(["squeue", "--noheader", f"--jobs={job_id}", "-o", "%A"], timeout_s=_SQUEUE_TIMEOUT_S).stdout.strip()
    except CommandError as error:
        raise SchedulerError(f"{error}; ask from a machine that has Slurm's commands") from error


def attach(attached: Attached) -> int:
    """Hold the shell in this terminal until its user leaves it; its status. Raises SchedulerError: srun is missing."""
    return in_terminal(attached.argv, clean_environment(os.environ))
