"""Sending a run folder's own script to sbatch: once at submission, and again for a successor.

A partition with PreemptMode=CANCEL never requeues: the run goes on as a new job on the same folder, sent from the
node by rank 0. The login side sends the first job through the same function.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError, SchedulerError
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.avoiding import exclude_option
from cfe_hpc.ranks.dependents import move_dependents
from cfe_hpc.ranks.jobrecords import record, record_job, records, unused_attempt
from cfe_hpc.ranks.patience import insist
from cfe_hpc.runfolder import RunFolder

__all__ = [
    "clean_environment",
    "record",
    "record_job",
    "records",
    "sbatch",
    "send",
    "send_export",
    "submit_successor",
    "unused_attempt",
]

logger = logging.getLogger(__name__)

_SBATCH_TIMEOUT_S = 120.0
_TAKE_ALONG_S = 20.0
"""A preemption's grace is no longer on some sites."""

# Of the job that sends, not of the one that is sent: Slurm's own and a rank's place. SBATCH_* would silently
# override what the script states, and the script is what was planned, shown and frozen.
_FOREIGN = re.compile(
    r"^(SLURM_(?!CONF$|CLUSTERS$).*|SLURMD_.*|SBATCH_.*|SRUN_.*|SUBMITIT_.*|PMI_.*|PMIX_.*"
    r"|(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE)"
    r"|(GROUP|ROLE)_(RANK|NAME|WORLD_SIZE)|TORCHELASTIC_.*"
    r"|CFE_(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|NUM_NODES|ATTEMPT|ATTEMPT_BASE|JOB_ID|RUN_DIR"
    r"|CONTROL_PORT|ALLOCATED_S|LOG|SWEEP_DIR|SWEEP_TASK|SWEEP_OFFSET|SWEEP_TASKS|HOSTS|PIDS|RELAY|RELAY_PID|RESTART|SCHEDULER|WORKER)"
    r"|CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|HABANA_VISIBLE_MODULES|HABANA_VISIBLE_DEVICES)$"
)

# sbatch's words, and what to do about them; the first that matches counts.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (r"invalid partition", "name one that `sinfo` lists: [resources] partition, or `queue` in the site profile"),
    (r"invalid account|account.*(not|invalid)", "set [resources] account to one of `sacctmgr show associations`"),
    (r"invalid qos", "set [resources] qos to one that your account may use, or leave it out"),
    (r"invalid (generic resource|gres)", "mend `gres` in the site profile: `sinfo -o %G` shows how it is spelt"),
    (r"invalid feature", "set [resources] constraint to features that `sinfo -o %f` lists"),
    (r"time limit", "ask for less time: [resources] time; `sinfo -o '%P %l'` shows the limits"),
    (r"node configuration is not available|memory specification|cpu count", "ask for less of a node: [resources]"),
    (r"node count|too many nodes", "ask for fewer nodes: [resources] nodes"),
    (r"dependency", "the run to wait for is no longer known to Slurm: submit without --after"),
    (r"violates|limit|max", "your account's limits are reached: wait for other jobs to end, or ask your site"),
    (r"contact slurm|configuration (source|file)|connect|timed out|munge|authentication", "check that this machine "
     "reaches the scheduler (`sinfo`), and SLURM_CONF"),
)  # fmt: skip


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the variables of a job, a step or a rank that may be sending, and without SBATCH_*."""
    return {name: value for name, value in environ.items() if not _FOREIGN.match(name)}


def send(folder: RunFolder, *, environment: Mapping[str, str], options: Sequence[str] = ()) -> str:
    """Give the run folder's submission.sh to sbatch.

    Args:
        environment: the whole environment of sbatch, and so of the job.
        options: further options of sbatch.

    Returns:
        The job id.

    Raises:
        SchedulerError: sbatch is missing, refused (in its own words, with what to do), or gave no answer.
    """
    return sbatch(folder, folder.submission_script, environment, options)


def sbatch(folder: RunFolder, script: Path, environment: Mapping[str, str], options: Sequence[str]) -> str:
    """Send a script of the run folder; the job id. Raises as `send`."""
    # The folder goes as an argument, not into the script: #SBATCH lines know no way to spell a line break.
    argv = ["sbatch", "--parsable", f"--chdir={folder.path}", *options, str(script)]
    try:
        printed = run(argv, timeout_s=_SBATCH_TIMEOUT_S, env=environment).stdout
    except CommandError as error:
        raise _refusal(error) from error
    match = re.search(r"^(\d+)(;.*)?$", printed.strip().splitlines()[-1] if printed.strip() else "")
    if match is None:
        raise SchedulerError(f"sbatch: printed no job id ({printed.strip()!r}); look for the job with squeue --me")
    return match.group(1)


def send_export(folder: RunFolder, *, job_id: str, environment: Mapping[str, str]) -> str | None:
    """Send the run folder's export.sh, where there is one, to start when job `job_id` has ended well.

    A requeued job keeps its id. Where a successor takes over, what waits for its predecessor waits for it.

    Returns:
        The job's id. None when there is nothing to send, or it was refused: that is told, and harms no training.
    """
    if not folder.export_script.exists():
        return None
    options = [f"--dependency=afterok:{job_id}", "--kill-on-invalid-dep=yes"]
    try:
        export_id = sbatch(folder, folder.export_script, environment, options)
        record(folder, "export", job_id=export_id, scheduler="slurm")
        return export_id
    except (OSError, SchedulerError) as error:
        remedy = f"give `cfe-hpc checkpoints export {folder.run_id} --epochs` when the run has completed"
        logger.warning("epochs will not be exported by themselves: %s; %s", error, remedy)
        return None


def _refusal(error: CommandError) -> SchedulerError:
    if "gave no answer" in str(error):  # it asks again for minutes where Slurm is full (MaxJobCount) or busy
        return SchedulerError(f"{error}; Slurm is busy, or takes no more jobs (MaxJobCount): try again later")
    if error.completed is None:
        return SchedulerError(f"{error}; submit from a machine that has Slurm's commands, or use --site local")
    words = [re.sub(r"^sbatch: (error: |fatal: )?", "", line) for line in error.completed.stderr.splitlines()]
    said = "; ".join(dict.fromkeys(word for word in words if word)) or str(error)
    found = (remedy for pattern, remedy in _REMEDIES if re.search(pattern, said, re.IGNORECASE))
    return SchedulerError(f"sbatch: refused the job ({said}); {next(found, 'see what `cfe-hpc check` says of it')}")


def submit_successor(folder: RunFolder, *, job_id: str, next_attempt: int, options: Sequence[str] = ()) -> str:
    """Send the run's script again, to start when job `job_id` has ended; one process of the run calls it, once.

    What waits for that job, the run's own export and the runs that were submitted to follow it, waits for the new one
    then.

    Args:
        job_id: "" when the run has no job that still runs.
        next_attempt: number of the first attempt of the new job.
        options: further options of sbatch.

    Returns:
        The new job's id, recorded in control/job-<k>.

    Raises:
        SchedulerError: sbatch refused or cannot be reached from here.
    """
    environment = clean_environment(os.environ) | {"CFE_ATTEMPT_BASE": str(next_attempt)}
    if folder.sweep_task is not None:  # its script is the sweep's, and this job no array
        environment["CFE_SWEEP_TASK"] = str(folder.sweep_task)
    dependency = [f"--dependency=afterany:{job_id}"] if job_id else []
    options = [*dependency, *options, *exclude_option(folder, RunSpec.read(folder.run_toml).plan)]
    successor = send(folder, environment=environment, options=options)
    record_job(folder, job_id=successor, scheduler="slurm", attempt_base=next_attempt, after=job_id)
    if job_id:
        _take_along(job_id, successor)
    else:
        send_export(folder, job_id=successor, environment=environment)
    return successor


def _take_along(job_id: str, successor: str) -> None:
    """Let what waits for a job wait for its successor. The successor is there already: whatever happens, it stays."""
    try:
        for waiting in insist(lambda: move_dependents(job_id, successor), patience_s=_TAKE_ALONG_S):
            logger.info("job %s, which waits for %s, waits for its successor %s now", waiting, job_id, successor)
    except CfeError as error:
        logger.warning("what waits for job %s may never start: %s", job_id, error)
