"""What is worth knowing before a job is sent: it may be well formed and planned, and still end badly."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.config.environment import TRAIN_ENTRY
from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import expand_runs_root
from cfe_hpc.errors import Problem
from cfe_hpc.process import CommandError, run
from cfe_hpc.recovery.contract import fits, time_to_save_s
from cfe_hpc.recovery.measured import Measured, need_s
from cfe_hpc.units import format_duration, format_seconds, format_size

__all__ = ["CHECKS", "Finding", "check", "cost_of_attempt"]

Severity = Literal["error", "warning", "note"]

SIGNAL_JITTER_S = 60
"""Slurm sends the signal before the time limit up to this much earlier than asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a check found.

    Attributes:
        id: names the check; stable.
        severity: "error": the run would fail; "warning": it may lose work or never get far; "note": worth knowing.
    """

    id: str
    severity: Severity
    problem: Problem

    def as_json(self) -> dict[str, Any]:
        """The finding as a flat JSON object."""
        return {"id": self.id, "severity": self.severity, **asdict(self.problem)}


Found = Iterator[tuple[Severity, Problem]]


def check(loaded: Loaded, plan: Plan, *, measured: Measured | None = None, notes: bool = True) -> list[Finding]:
    """Run the checks, on this machine and without a scheduler; the worst findings first.

    Args:
        measured: what an earlier run of the job has measured in this partition.
        notes: run those too that never find more than a note.

    Raises:
        ConfigError: the parameters of the training that cfe_hpc ships do not fit the number of ranks.
    """
    if loaded.job.entry == TRAIN_ENTRY:
        # By dotted name: launch and train are neighbours that may not import one another.
        config = import_module("cfe_hpc.train.config")
        params = config.read_params(loaded.job.params, file=loaded.job_file, origins=loaded.origins)
        config.grad_accum_steps(params, world_size=plan.world_size, file=_file(loaded, "job.params.global_batch"))
    findings = [
        Finding(id=name, severity=severity, problem=problem)
        for name, look in CHECKS.items()
        if notes or name not in _NOTES
        for severity, problem in look(loaded, plan, measured)
    ]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def cost_of_attempt(loaded: Loaded, plan: Plan) -> float | None:
    """Price of one attempt that uses up its time, in the site's currency; None when price or time is unknown."""
    price = loaded.site.hardware[loaded.site.partitions[plan.partition].hardware].cost_per_node_hour
    return None if price is None or plan.time_s is None else price * plan.nodes * plan.time_s / 3600


def _file(loaded: Loaded, key: str) -> str:
    """Where a value came from; the file in which to set it when it is a default."""
    origin = loaded.origins.get(key, "default")
    return origin if origin != "default" else loaded.job_file if key.startswith("job.") else loaded.site_file


def _problem(loaded: Loaded, key: str, what: str, remedy: str, value: Any = None) -> Problem:
    return Problem(file=_file(loaded, key), key=key.partition(".")[2], what=what, value=value, remedy=remedy)


def _no_checkpoints(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    checkpoint = loaded.job.checkpoint
    if loaded.job.entry is not None and checkpoint.every_steps is None and checkpoint.every is None:
        what, remedy = (
            "a node that dies costs the whole run: nothing is saved until a stop is announced",
            ('set every_steps, or every = "15m"'),
        )
        yield "warning", _problem(loaded, "job.checkpoint.every", what, remedy)


def _kept_seldom(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    keep, every = loaded.job.checkpoint.keep_every_steps, loaded.job.checkpoint.every_steps
    if keep is not None and every is not None and keep % every:
        what = f"checkpoints come every {every} steps, so that only every {math.lcm(keep, every)}th step is kept"
        yield "warning", _problem(loaded, "job.checkpoint.keep_every_steps", what, f"use a multiple of {every}", keep)


def _staging_unused(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    checkpoint = loaded.job.checkpoint
    if checkpoint.staging_memory is not None and not checkpoint.async_:
        what, remedy = "bounds what asynchronous checkpoints take, and these are not", "set async = true"
        value = format_size(checkpoint.staging_memory)
        yield "note", _problem(loaded, "job.checkpoint.staging_memory", what, remedy, value)


def _overlap_unused(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if loaded.job.checkpoint.overlap and not loaded.job.checkpoint.async_:
        what, remedy = "makes asynchronous checkpoints wait less, and these are not", "set async = true"
        yield "note", _problem(loaded, "job.checkpoint.overlap", what, remedy, True)


def _local_tier(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if loaded.job.checkpoint.local and loaded.site.storage.node_local is None:
        what = "checkpoint.local writes to a folder of each node, and the site names none"
        remedy = "set it in the site profile, or take checkpoint.local out"
        yield "error", _problem(loaded, "site.storage.node_local", what, remedy)


def _remote_tier(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    url = loaded.job.checkpoint.remote
    if url is not None and loaded.site.environment.python is None and find_spec("fsspec") is None:
        what, remedy = "fsspec is not installed: no checkpoint would go there", "pip install cfe-hpc[remote]"
        yield "error", _problem(loaded, "job.checkpoint.remote", what, remedy, url)


def _short_grace(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    room_s, fit = time_to_save_s(plan, loaded.site), fits(plan, loaded.site, measured)
    if fit or room_s is None or (measured is None and room_s >= plan.signal_lead_s):
        return
    if measured is None:
        what = f"preemption leaves less time to save than the {plan.signal_lead_s} s that the site thinks are needed"
        remedy = "save often, or choose another partition"
    else:
        what = f"a step and a save took {format_seconds(need_s(measured))} in an earlier run: preemption comes sooner"
        remedy = "saves come more often by themselves; or set checkpoint.every"
        if not loaded.job.recovery.adapt_saves:
            remedy = "set checkpoint.every, or recovery.adapt_saves = true"
    key = f"site.partitions.{plan.partition}.preemption.grace"
    yield "warning", _problem(loaded, key, what, remedy, format_duration(room_s))


def _preemption_contract(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    slurm = loaded.site.slurm
    unknown = [key for key in ("version", "proctrack") if getattr(slurm, key) is None]
    if loaded.site.scheduler == "slurm" and plan.preemption.ends_attempts and unknown:
        what = f"what Slurm does to a preempted job here is not fully known: {' and '.join(unknown)} not set"
        remedy = f"`cfe-hpc sites check {loaded.site.name}` on a login node tells"
        yield "note", _problem(loaded, f"site.slurm.{unknown[0]}", what, remedy)


def _no_requeue(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if loaded.site.slurm.job_requeue is False:
        what = "this cluster requeues only jobs that ask for it, as all of cfe_hpc's do"
        remedy = "nothing to do; where the site takes that back, a new job goes on in the same run folder"
        yield "note", _problem(loaded, "site.slurm.job_requeue", what, remedy, False)


def _elastic_batch(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if plan.nodes_min is None or loaded.job.entry != TRAIN_ENTRY:
        return
    config = import_module("cfe_hpc.train.config")
    params = config.read_params(loaded.job.params, file=loaded.job_file, origins=loaded.origins)
    unfit = [n for n in range(plan.nodes_min, plan.nodes) if params.global_batch % (n * plan.devices_per_node)]
    if unfit:
        nodes = ", ".join(map(str, unfit))
        what = f"cannot be shared out evenly among the ranks of {nodes} node{'s' if unfit != [1] else ''}"
        remedy = f"use a multiple of all of them times {plan.devices_per_node}, or raise launch.nodes_min"
        yield "error", _problem(loaded, "job.params.global_batch", what, remedy, params.global_batch)


def _preemption_cancels(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if plan.preemption.mode == "cancel":
        key = f"site.partitions.{plan.partition}.preemption.mode"
        what = "a preempted job is cancelled: the run goes on as a new job in the same run folder"
        yield "note", _problem(loaded, key, what, "nothing to do: the job id changes, the run id stays", "cancel")


def _signal_at_start(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if plan.time_s is not None and loaded.site.scheduler == "slurm":
        useful_s = plan.time_s - plan.signal_lead_s - SIGNAL_JITTER_S
        if useful_s <= 0:
            what = f"the signal comes {plan.signal_lead_s} s before the end, and Slurm may send it a minute earlier"
            remedy = f"ask for more than {format_duration(plan.signal_lead_s + SIGNAL_JITTER_S)}"
            yield "warning", _problem(loaded, "job.resources.time", what, remedy, format_duration(plan.time_s))


def _no_time_limit(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if plan.time_s is None and loaded.site.scheduler == "slurm":
        what = "no time limit is known, so the scheduler's own default ends each attempt unannounced to the plan"
        yield "note", _problem(loaded, "job.resources.time", what, 'set time, e.g. time = "4h"')


def _data_missing(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    data = loaded.job.params.get("data", "stdlib")
    if loaded.job.entry == TRAIN_ENTRY and data != "stdlib" and not Path(data).expanduser().is_file():
        remedy = "build it with `cfe-hpc data build`, or check the path"
        yield "error", _problem(loaded, "job.params.data", "no such token file", remedy, data)


def _runs_root(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    key = "site.storage.runs_root"
    root = expand_runs_root(loaded.site, os.environ, file=_file(loaded, key))
    standing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        remedy = "choose a folder that you may write to"
        yield "error", _problem(loaded, key, f"cannot be written under {standing}", remedy, str(root))
    elif loaded.site.scheduler == "slurm" and plan.nodes > 1 and root.is_relative_to("/tmp"):
        what, remedy = "lies under /tmp, which each node has for itself", "choose a folder that every node sees"
        yield "warning", _problem(loaded, key, what, remedy, str(root))


def _program_missing(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    job, environment = loaded.job, loaded.site.environment
    if job.entry is not None and environment.python is None:
        top = job.entry.split(":")[0].split(".")[0]
        here = Path.cwd()
        if find_spec(top) is None and not (here / top).is_dir() and not (here / f"{top}.py").is_file():
            what, remedy = f"no module named {top} here", "install it, or submit from the folder that holds it"
            yield "warning", _problem(loaded, "job.entry", what, remedy, job.entry)
    if job.command is not None and not environment.modules and not environment.setup:
        program = job.command[0]
        if "{" not in program and shutil.which(program) is None:
            what, remedy = "no such program on this machine", "check the name, or name its path"
            yield "warning", _problem(loaded, "job.command", what, remedy, program)


def _not_yet(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    if loaded.job.metrics.otlp_endpoint is not None:
        what, remedy = "this version does not export OpenTelemetry", "use pushgateway or port"
        yield "warning", _problem(loaded, "job.metrics.otlp_endpoint", what, remedy, loaded.job.metrics.otlp_endpoint)


def _git_dirty(loaded: Loaded, plan: Plan, measured: Measured | None) -> Found:
    try:
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"], timeout_s=5).stdout.splitlines()
    except CommandError:  # no git, or no work tree: nothing to compare with
        return
    if changed:
        what = f"the work tree has uncommitted changes in {len(changed)} tracked files"
        remedy = "commit them so that the run can be repeated; the hash of the difference is recorded"
        yield "note", Problem(file=str(Path.cwd()), key="", what=what, remedy=remedy)


CHECKS: dict[str, Callable[[Loaded, Plan, Measured | None], Found]] = {
    "data-missing": _data_missing,
    "runs-root": _runs_root,
    "program-missing": _program_missing,
    "no-checkpoints": _no_checkpoints,
    "kept-seldom": _kept_seldom,
    "staging-unused": _staging_unused,
    "overlap-unused": _overlap_unused,
    "local-tier": _local_tier,
    "remote-tier": _remote_tier,
    "short-grace": _short_grace,
    "preemption-contract": _preemption_contract,
    "no-requeue": _no_requeue,
    "elastic-batch": _elastic_batch,
    "signal-at-start": _signal_at_start,
    "no-time-limit": _no_time_limit,
    "preemption-cancels": _preemption_cancels,
    "not-yet": _not_yet,
    "git-dirty": _git_dirty,
}
"""Every check by its id. One is added by a function and a row."""

_NOTES = frozenset({"no-time-limit", "preemption-cancels", "preemption-contract", "no-requeue", "git-dirty"})
