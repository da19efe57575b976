"""`debug`: a job small enough to look at, in this terminal, on a node of the site's or on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import SchedulerError, UsageError
from cfe_hpc.files import write_atomic
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.container import contained, srun_options
from cfe_hpc.launch.localranks import place_variables
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.script import exports, imports, prologue
from cfe_hpc.launch.terminal import in_terminal
from cfe_hpc.process import start_ticks
from cfe_hpc.ranks.child import die_with_parent
from cfe_hpc.ranks.successor import clean_environment, record_job
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder, safe_name
from cfe_hpc.units import slurm_time

__all__ = ["hold_session", "session_argv", "session_script", "shrink"]

_DEFAULT_TIME_S = 3600.0

_END_S = 10.0
"""For the other ranks, when the session is over, until they are killed."""


def shrink(loaded: Loaded, *, ranks: int, time_s: float | None) -> Loaded:
    """The job as a session runs it: on so many ranks, on as few nodes as hold them, in the site's debug partition.

    A partition that the command line names is left alone, and so is one whose devices the debug partition lacks.

    Args:
        time_s: longest time of the session; an hour when None, or less where the partition allows no more.

    Raises:
        UsageError: the ranks do not divide among nodes.
        ConfigError, ImpossibleError: as `launch.plan.plan`.
    """
    site, resources = loaded.site, loaded.job.resources
    launch = loaded.job.launch.model_copy(update={"launcher": "srun", "nodes_min": None, "restarts": 0})
    # Whoever looks at a rank in the debugger stops them all: that is no hang.
    recovery = loaded.job.recovery.model_copy(update={"hang_after": 0.0})
    smallest = resources.model_copy(update={"nodes": 1, "time": None})
    # The code as it is: whoever debugs changes it, and starts again.
    snapshot = loaded.job.snapshot.model_copy(update={"mode": "off"})
    changed = {"launch": launch, "recovery": recovery, "snapshot": snapshot, "resources": smallest}
    job = loaded.job.model_copy(update=changed)
    planned = plan(job, site, loaded.origins)
    name = planned.partition
    if site.debug_partition is not None and loaded.origins.get("job.resources.partition") != "--set":
        there = site.hardware[site.partitions[site.debug_partition].hardware]
        name = site.debug_partition if there.accelerator == planned.accelerator else name
    hardware = site.hardware[site.partitions[name].hardware]
    each = min(ranks, resources.devices_per_node or hardware.devices_per_node, hardware.devices_per_node)
    if ranks % each:
        raise UsageError(f"--ranks: {ranks} do not divide among nodes with {each} devices; give a multiple of {each}")
    wanted: dict[str, Any] = {"nodes": ranks // each, "devices_per_node": each, "partition": name}
    if resources.memory is not None:
        wanted["memory"] = resources.memory * each // planned.devices_per_node
    qos = site.qos.get(resources.qos or site.partitions[name].qos or "")
    limits = (_DEFAULT_TIME_S, site.partitions[name].time_limit, None if qos is None else qos.time_limit)
    wanted["time"] = min(limit for limit in limits if limit is not None) if time_s is None else time_s
    return replace(loaded, job=job.model_copy(update={"resources": resources.model_copy(update=wanted)}))


def session_script(spec: RunSpec, folder: RunFolder, *, shell: bool) -> str:
    """The script of each rank of the session: the job's environment, then the rank."""
    words = [spec.provenance.python, "-u", "-m", "cfe_hpc.ranks.debugging", str(folder.path)]
    rank = contained(spec, folder, shlex.join([*words, *(["--shell"] if shell else [])]))
    if spec.job.environment.container.kind == "pyxis":  # the script itself runs inside: modules are the node's
        lines = [f"export CFE_RUN_DIR={shlex.quote(str(folder.path))}", *imports(spec), *exports(spec)]
    else:
        lines = prologue(spec, folder)
    return _script(
        'export CFE_ALLOCATED_S="$(date +%s.%N)"',
        *lines,
        "export CFE_SCHEDULER=none",  # nobody requeues a session
        f"cd -- {shlex.quote(spec.provenance.start_folder)} || exit 1",
        f"exec {rank}",
    )


def _script(*lines: str) -> str:
    return "\n".join(["#!/bin/bash", *lines, ""])


def session_argv(spec: RunSpec, folder: RunFolder) -> list[str]:
    """What starts the session in this terminal: `srun --pty`, or the script itself on this machine."""
    script = ["bash", str(folder.submission_script)]
    if spec.site.scheduler != "slurm":
        return script
    plan = spec.plan
    options = {
        "job-name": f"{safe_name(spec.job.name)}-debug",
        "partition": plan.queue,
        "account": plan.account,
        "qos": plan.qos,
        "constraint": plan.constraint,
        "gres": plan.gres,
        "mem": None if plan.memory_bytes is None else f"{-(-plan.memory_bytes // 2**20)}M",
        "time": None if plan.time_s is None else slurm_time(plan.time_s),
        "nodes": plan.nodes,
        "ntasks": plan.world_size,
        "ntasks-per-node": plan.devices_per_node,
        "cpus-per-task": plan.cpus_per_device,
        "export": "ALL",
        "kill-on-bad-exit": 1,
        "wait": 0,  # another rank that has ended must not end the session
    }
    stated = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["srun", "--pty", *stated, *plan.options, *shlex.split(srun_options(spec, folder)), *script]


def hold_session(spec: RunSpec, folder: RunFolder, *, script: str) -> int:
    """Hold the session in this terminal until its user ends it, and write down that it has ended.

    Returns:
        The status of rank 0.

    Raises:
        SchedulerError: Slurm gave no allocation, or is not there; the folder is gone again, and so is the job.
    """
    write_atomic(folder.submission_script, script)
    if spec.site.scheduler != "slurm":
        facts = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "host": socket.gethostname()}
        record_job(folder, job_id=f"local-{os.getpid()}", scheduler="local", attempt_base=0, **facts)

    queued: list[str] = []

    def heard(line: str) -> None:
        waits = re.match(r"srun: job (\d+) queued", line)
        if waits:
            queued.append(waits[1])
            record_job(folder, job_id=waits[1], scheduler="slurm", attempt_base=0)

    def waiting() -> bool:
        return bool(queued) and folder.promised("debug-begun") is None

    argv = session_argv(spec, folder)
    of_srun: dict[str, Any] = {"heard": heard, "given_up": waiting} if argv[0] == "srun" else {}
    try:
        with _other_ranks(spec, folder):
            code = in_terminal(argv, _environment(spec, 0), **of_srun)
    finally:
        begun = _close(folder)
    if not begun:
        for job_id in queued:  # a srun that had to be killed leaves it in the queue
            backend_for("slurm").cancel({"job_id": job_id})
        raise SchedulerError(
            f"{argv[0]}: gave no session (status {code}, its words stand above); try `cfe-hpc check JOB`"
        )
    return code


def _close(folder: RunFolder) -> bool:
    """Write down that the session has ended, unless the run said how; a folder in which nothing began is removed, and
    the answer False then, unless somebody cancelled it."""
    if folder.result() is not None:
        return True
    cancelled = folder.promised("cancel") is not None
    if folder.promised("debug-begun") is None and not cancelled:
        shutil.rmtree(folder.path, ignore_errors=True)
        return False
    reason = "cancelled by the user" if cancelled else "the debug session has ended"
    folder.note_event("cancelled", attempt=0, reason=reason)
    write_result(folder, "CANCELLED", attempts=1, reason=reason)
    return True


def _environment(spec: RunSpec, rank: int) -> dict[str, str]:
    """The environment that a rank's script is started in; with a scheduler srun adds the rank's place."""
    environment = clean_environment(os.environ)
    if spec.site.scheduler == "slurm":
        return environment
    place = place_variables(spec.plan.nodes, spec.plan.devices_per_node, rank)
    return {**environment, **place, "CFE_ATTEMPT": "0", "CFE_JOB_ID": f"local-{os.getpid()}"}


@contextlib.contextmanager
def _other_ranks(spec: RunSpec, folder: RunFolder) -> Iterator[None]:
    """Without a scheduler: the ranks from 1 on, beside the body; they end with it."""
    argv, started = session_argv(spec, folder), list[subprocess.Popen[bytes]]()
    try:
        for rank in range(1, 1 if spec.site.scheduler == "slurm" else spec.plan.world_size):
            # A session of its own: Ctrl-C in this terminal is for rank 0.
            process = subprocess.Popen(
                argv,
                env=_environment(spec, rank),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            started.append(process)
        yield
    finally:
        folder.note("debug-over", "the debug session is over")
        for process in started:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
