"""Slurm, through submitit. The only module that knows submitit: nothing else here imports it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from cfe_hpc.config.run import Plan, RunSpec
from cfe_hpc.errors import ConfigError, Problem, SchedulerError
from cfe_hpc.files import write_atomic
from cfe_hpc.launch.dependencies import awaited, dependency, keep_up, note_dependent
from cfe_hpc.launch.exporting import export_script
from cfe_hpc.launch.preparation import starter
from cfe_hpc.launch.queue import forget_queue, queue
from cfe_hpc.launch.script import prologue
from cfe_hpc.launch.states import JobState
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.avoiding import exclude_option
from cfe_hpc.ranks.successor import (
    clean_environment,
    record_job,
    send,
    send_export,
    submit_successor,
)
from cfe_hpc.runfolder import RunFolder, safe_name
from cfe_hpc.units import slurm_time

__all__ = ["SlurmBackend"]

_TIMEOUT_S = 60.0
_OPTION = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(=(?P<value>[^\n\r\0]+))?")

# Until Python has its handlers, a stop signal would kill the task: on Slurm before 24.05 the job then counts as
# FAILED and is lost. Ignored signals stay ignored across exec; ranks look for a preemption under way when they start.
_SHIELD = 'trap "" TERM USR1 USR2; exec "$@"'
_SHIELDED = shlex.join(["sh", "-c", _SHIELD, "sh"])
_TO_LOG = 'log="$CFE_LOG$SLURM_PROCID"; exec >>"$log.out" 2>>"$log.err"'
_LOGGING = shlex.join(["sh", "-c", f"{_TO_LOG}; {_SHIELD}", "sh"])

# RunFolder.log_stem, but for the rank.
_RANK_LOGS = (
    "$CFE_RUN_DIR/logs/${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    ".$((CFE_ATTEMPT_BASE + ${SLURM_RESTART_COUNT:-0}))."
)


class _Executor(SlurmExecutor):
    """submitit's, with our script around the task and our own sending (no clutter, sbatch's words in errors)."""

    def __init__(self, spec: RunSpec, folder: RunFolder, *, options: Sequence[str] = ()) -> None:
        super().__init__(folder.path, python=shlex.quote(spec.provenance.python))
        self._spec, self._run_folder, self._options = spec, folder, options
        self.update_parameters(**_parameters(spec, folder))

    @classmethod
    def affinity(cls) -> int:
        return 2  # a script can be shown where there is no srun

    @property
    def _submitit_command_str(self) -> str:
        tasks, cpus = _tasks(self._spec.plan)
        # An elastic job may have got fewer nodes than it asked for.
        total = f'--ntasks="$((SLURM_JOB_NUM_NODES * {tasks}))"'
        # From 22.05 on srun no longer takes cpus-per-task from the job.
        each = f"--ntasks-per-node={tasks} --cpus-per-task={cpus}"
        python = shlex.quote(self._spec.provenance.python)
        options, words = self._in_container(f'{python} -u "$CFE_RUN_DIR/start.py" cfe_hpc.ranks "$CFE_RUN_DIR"')
        return f"srun --unbuffered --kill-on-bad-exit=1 --export=ALL {total} {each}{options} {_LOGGING} {words}"

    def _in_container(self, words: str) -> tuple[str, str]:
        """What srun is told besides, and its task."""
        kind = self._spec.job.environment.container.kind
        if kind == "none":
            return "", words
        from cfe_hpc.launch.container import contained, srun_options  # late: few jobs have one

        if kind == "pyxis":
            return srun_options(self._spec, self._run_folder), words
        # The shield is for what srun starts; inside of the container, too, nobody may be ended by a signal yet.
        return "", contained(self._spec, self._run_folder, f"{_SHIELDED} {words}")

    def script(self) -> str:
        """The text that sbatch gets."""
        text: str = self._make_submission_file_text(self._submitit_command_str, uid="")
        return text

    def send(self) -> str:
        """Write what the job needs to the run folder, and send it; the job id, recorded in control/."""
        folder, environment = self._run_folder, clean_environment(os.environ)
        write_atomic(folder.starter, starter(self._spec))
        write_atomic(folder.submission_script, self.script())
        if self._spec.job.sweep is not None:
            from cfe_hpc.config.tasks import Tasks  # late: few jobs are sweeps
            from cfe_hpc.launch.arrays import send_tasks

            return send_tasks(self._spec, folder, range(Tasks.read(folder.sweep_json).tasks), options=self._options)[0]
        options = [*self._options, *exclude_option(folder, self._spec.plan)]
        job_id = send(folder, environment=environment, options=options)
        record_job(folder, job_id=job_id, scheduler="slurm", attempt_base=0)
        return job_id


def _tasks(plan: Plan) -> tuple[int, int]:
    """(tasks on a node, cores of each): the ranks, or a launcher that starts them."""
    tasks = plan.tasks_per_node or plan.devices_per_node
    return tasks, plan.cpus_per_device * plan.devices_per_node // tasks


def _elastic(plan: Plan) -> bool:
    """Whether an attempt may start on fewer nodes than the job would like."""
    return plan.nodes_min not in (None, plan.nodes)


def _parameters(spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """The plan in submitit's words; None leaves an option to the site's default."""
    plan = spec.plan
    tasks, cpus = _tasks(plan)
    stated = {
        "job_name": safe_name(spec.job.name),
        "partition": plan.queue or None,
        "account": plan.account,
        "qos": plan.qos,
        "constraint": plan.constraint,
        "gres": plan.gres,
        "mem": None if plan.memory_bytes is None else f"{-(-plan.memory_bytes // 2**20)}M",
    }
    python = shlex.quote(spec.provenance.batch_python)
    return {
        **{key: None if value is None else _directive(spec, key, value) for key, value in stated.items()},
        "time": None,  # in minutes, and 5 unless set
        "nodes": plan.nodes,
        # Told of tasks, Slurm (22.05) takes no more nodes of a range than the fewest: it is asked for cores alone.
        "ntasks_per_node": None if _elastic(plan) else tasks,
        "cpus_per_task": cpus * tasks if _elastic(plan) else cpus,
        "wckey": None,
        "use_srun": False,  # submitit would put unescaped paths into srun's patterns; our command has its own srun
        "additional_parameters": _additional(spec, folder),
        "setup": [
            # Not bash's EPOCHREALTIME, which writes the decimal point as the locale has it.
            'export CFE_ALLOCATED_S="$(date +%s.%N)"',
            *prologue(spec, folder),
            *_attempt_base(spec, python),
            'cd -- "$CFE_RUN_DIR" || exit 1',
            *_redirection(spec, folder),
            f'export CFE_LOG="{_RANK_LOGS}{"" if plan.launcher == "srun" else "node"}"',
            *_relay(spec),
            # Told to end, bash would go at once and leave out what comes after srun.
            "trap : TERM",
        ],
        "teardown": [
            "code=$?",
            *_relay_end(spec),
            f'{python} -m cfe_hpc.ranks.epilogue "$CFE_RUN_DIR" "$code"',
            'exit "$code"',
            "",
        ],
    }


def _log(folder: RunFolder, script: str, ending: str) -> str | None:
    """A script's log for #SBATCH, relative to the job's working directory: the run folder. None where the
    folder's path holds what Slurm (22.05) takes for a pattern, even there: the script then redirects by itself."""
    return None if re.search(r"[%\\]", str(folder.path)) else f"logs/%j.{script}.{ending}"


def _relay(spec: RunSpec) -> list[str]:
    """Lines that let ranks in a container ask Slurm, whose commands are outside of it."""
    if spec.job.environment.container.kind == "none":
        return []
    return [f'eval "$({shlex.quote(spec.provenance.batch_python)} -m cfe_hpc.ranks.relay)"']


def _relay_end(spec: RunSpec) -> list[str]:
    return [] if spec.job.environment.container.kind == "none" else ['kill -KILL "$CFE_RELAY_PID"; unset CFE_RELAY']


def _attempt_base(spec: RunSpec, python: str) -> list[str]:
    """Lines that tell the number of the job's first attempt; a task of a sweep looks into its folder, or makes it."""
    if spec.job.sweep is None:
        return ['export CFE_ATTEMPT_BASE="${CFE_ATTEMPT_BASE:-0}"']
    return [f'CFE_ATTEMPT_BASE="$({python} -m cfe_hpc.ranks.sweep_task)" || exit 1', "export CFE_ATTEMPT_BASE"]


def _redirection(spec: RunSpec, folder: RunFolder) -> list[str]:
    if _log(folder, "batch", "out") or spec.job.sweep is not None:
        return []
    return ['exec >>"logs/$SLURM_JOB_ID.batch.out" 2>>"logs/$SLURM_JOB_ID.batch.err"']


def _additional(spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """Options that submitit has no word for, or spells in coarser units."""
    plan = spec.plan
    own = spec.job.sweep is None  # tasks of a sweep turn to their own folders' logs
    options: dict[str, Any] = {
        "requeue": True,
        "open-mode": "append",
        "output": (own and _log(folder, "batch", "out")) or "/dev/null",
        "error": (own and _log(folder, "batch", "err")) or "/dev/null",
        "signal": f"{plan.signal}@{plan.signal_lead_s}",
        **({} if plan.time_s is None else {"time": slurm_time(plan.time_s)}),
        **({"nodes": f"{plan.nodes_min}-{plan.nodes}"} if _elastic(plan) else {}),
    }
    for option in plan.options:
        match = _OPTION.fullmatch(option)
        if match is None:
            key = f"partitions.{plan.partition}.options"
            remedy = 'write "--name" or "--name=value", one option an entry'
            problem = Problem(
                file=spec.provenance.site_file, key=key, what="not an sbatch option", value=option, remedy=remedy
            )
            raise ConfigError([problem])
        value = match["value"]
        options[match["name"]] = True if value is None else _escaped(value)
    return options


def _directive(spec: RunSpec, key: str, value: str) -> str:
    if re.search(r"[\n\r\0]", value):
        problem = Problem(
            file=spec.provenance.job_file,
            key=f"plan.{key}",
            what="holds a line break, which no #SBATCH line can",
            value=value,
            remedy="write it on one line",
        )
        raise ConfigError([problem])
    return _escaped(value)


def _escaped(value: str) -> str:
    # sbatch reads a backslash as an escape even between the single quotes that submitit adds.
    return value.replace("\\", "\\\\")


class SlurmBackend:
    """`Backend` over sbatch, squeue, scancel and scontrol. See launch.backend.Backend for the contracts."""

    def preview(self, spec: RunSpec, folder: RunFolder) -> str:
        return _Executor(spec, folder).script()

    def submit(self, spec: RunSpec, folder: RunFolder, *, after: Sequence[RunFolder] = ()) -> str:
        upstream = awaited(after)
        options = dependency(upstream)
        job_id = _Executor(spec, folder, options=options).send()
        note_dependent(after, folder)
        keep_up(upstream, options)
        if spec.job.checkpoint.export_epochs is not None:
            log = [_log(folder, "export", ending) or "/dev/null" for ending in ("out", "err")]
            write_atomic(folder.export_script, export_script(spec, folder, log=log))
            send_export(folder, job_id=job_id, environment=clean_environment(os.environ))
        return job_id

    def resubmit(self, spec: RunSpec, folder: RunFolder, *, next_attempt: int, after: Sequence[RunFolder] = ()) -> str:
        options = dependency(after)
        job_id = submit_successor(folder, job_id="", next_attempt=next_attempt, options=options)
        keep_up(after, options)
        return job_id

    def submit_tasks(
        self, spec: RunSpec, sweep: RunFolder, tasks: Sequence[int], *, after: Sequence[RunFolder] = ()
    ) -> list[str]:
        from cfe_hpc.launch.arrays import send_tasks  # late: few jobs are sweeps

        sent = send_tasks(spec, sweep, tasks, options=dependency(after))
        forget_queue()
        return sent

    def states(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobState]:
        return queue(job["job_id"] for job in jobs)

    def cancel(self, job: dict[str, Any]) -> None:
        _tell(["scancel", job["job_id"]])

    def request_save(self, job: dict[str, Any], spec: RunSpec) -> None:
        _tell(["scancel", f"--signal={spec.plan.signal}", job["job_id"]])

    def release(self, job: dict[str, Any]) -> None:
        _tell(["scontrol", "release", job["job_id"]])


def _tell(argv: list[str]) -> None:
    done = _ask(argv)
    forget_queue()
    # Already gone: the end that was asked for has come.
    if done.returncode != 0 and not re.search(r"Invalid job id|already", done.stderr, re.IGNORECASE):
        raise SchedulerError(f"{argv[0]}: refused ({done.stderr.strip()}); look at the job with squeue --me")


def _ask(argv: list[str]) -> Any:
    try:
        return run(argv, timeout_s=_TIMEOUT_S, check=False)
    except CommandError as error:
        raise SchedulerError(f"{error}; ask from a machine that has Slurm's commands") from error
