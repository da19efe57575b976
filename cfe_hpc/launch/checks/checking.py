"""What is worth knowing before a job is sent: it may be well formed and planned, and still end badly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from cfe_hpc.config.checks import CHECKS, Severity
from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan
from cfe_hpc.errors import ConfigError, ImpossibleError, Problem
from cfe_hpc.launch.checks import addresses, asking, engines, files, room, saving, stopping
from cfe_hpc.launch.checks.facts import Facts, Look
from cfe_hpc.recovery.measured import Measured

__all__ = ["LOOKS", "Finding", "check", "findings_of"]


def _quota_left(facts: Facts) -> Iterator[Problem]:
    from cfe_hpc.launch.checks.quotas import quota_left  # it starts programs, which `submit` has no time for

    return quota_left(facts)


LOOKS: dict[str, Look] = {
    "account-missing": asking.account_missing,
    "account": asking.account_allowed,
    "qos": asking.qos_allowed,
    "constraint": asking.constraint_unknown,
    "array-size": asking.array_size,
    "submit-max": asking.submit_max,
    "cost": asking.cost_max,
    "cost-unknown": asking.cost_unknown,
    "site-unverified": asking.site_unverified,
    "gres-missing": asking.gres_missing,
    "gres-fixed": asking.gres_fixed,
    "whole-nodes": asking.whole_nodes,
    "cores-share": asking.cores_share,
    "threads": asking.threads,
    "model-memory": room.model_memory,
    "device-memory": room.device_memory,
    "node-memory": room.node_memory,
    "deepspeed-trainer": engines.deepspeed_trainer,
    "offload-stage": engines.offload_stage,
    "offload-path": engines.offload_path,
    "optimizer": engines.optimizer,
    "offload-cpu": engines.offload_cpu,
    "unsaved-state": engines.unsaved_state,
    "grad-accum": engines.grad_accum_dtype,
    "bf16-hardware": engines.bf16_hardware,
    "engine-unused": engines.engine_unused,
    "zero-alone": engines.zero_alone,
    "data-missing": files.data_missing,
    "data-damaged": files.data_damaged,
    "data-private": files.data_private,
    "workdir-private": files.workdir_private,
    "runs-root": files.runs_root,
    "runs-root-private": files.runs_root_private,
    "program-missing": files.program_missing,
    "python-missing": files.python_missing,
    "secret-in-job": files.secret_in_job,
    "git-dirty": files.git_dirty,
    "disk-full": room.disk_full,
    "checkpoint-space": room.checkpoint_space,
    "quota": room.quota,
    "inodes": room.inodes,
    "quota-files": room.quota_files,
    "quota-left": _quota_left,
    "purged": room.purged,
    "no-checkpoints": saving.no_checkpoints,
    "saves-never": saving.saves_never,
    "kept-seldom": saving.kept_seldom,
    "resume-missing": saving.resume_missing,
    "resume-shapes": saving.resume_shapes,
    "best-unlogged": saving.best_unlogged,
    "staging-unused": saving.staging_unused,
    "overlap-unused": saving.overlap_unused,
    "local-tier": saving.local_tier,
    "node-local-shared": files.node_local_shared,
    "node-local-space": room.node_local_space,
    "remote-tier": saving.remote_tier,
    "remote-package": saving.remote_package,
    "lead-short": stopping.lead_short,
    "signal-at-start": stopping.signal_at_start,
    "no-time-limit": stopping.no_time_limit,
    "short-grace": stopping.short_grace,
    "preemption-contract": stopping.preemption_contract,
    "preemption-cancels": stopping.preemption_cancels,
    "no-requeue": stopping.no_requeue,
    "nccl-signal": stopping.nccl_signal,
    "elastic-batch": stopping.elastic_batch,
    "elastic-local": stopping.elastic_local,
    "port-privileged": addresses.port_privileged,
    "port-taken": addresses.port_taken,
    "port-ephemeral": addresses.port_ephemeral,
    "metrics-package": addresses.metrics_package,
    "gateway-loopback": addresses.gateway_loopback,
    "gateway-password": addresses.gateway_password,
    "not-yet": addresses.not_yet,
}
"""What looks at a planned job. The other ids of `config.checks` belong to reading and planning, which raise."""


_SLOW = frozenset({"quota-left"})
"""They start programs: `check` alone runs them."""


class Finding(NamedTuple):
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
        fields = asdict(self.problem)
        fields.pop("check")
        return {"id": self.id, "severity": self.severity, **fields}


def check(loaded: Loaded, plan: Plan, *, measured: Measured | None = None, notes: bool = True) -> list[Finding]:
    """Run the checks that the job does not ignore, on this machine and without a scheduler; the worst findings first.

    Args:
        measured: what an earlier run of the job has measured in this partition.
        notes: run those too that only find notes, or that take longer.

    Raises:
        ConfigError: the parameters of the training that cfe_hpc ships do not fit the number of ranks.
    """
    facts = Facts(loaded=loaded, plan=plan, measured=measured, workdir=Path.cwd())
    if facts.params is not None:
        config = import_module("cfe_hpc.train.config")
        file = facts.file_of("job.params.global_batch")
        config.grad_accum_steps(facts.params, world_size=plan.world_size, file=file)
    ignored = loaded.job.checks.ignore
    findings = [
        Finding(id=name, severity=CHECKS[name].severity, problem=problem)
        for name, look in LOOKS.items()
        if name not in ignored and (notes or (CHECKS[name].severity != "note" and name not in _SLOW))
        for problem in look(facts)
    ]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def findings_of(error: ConfigError | ImpossibleError) -> list[Finding]:
    """What reading or planning found, as findings."""
    fallback = "impossible" if isinstance(error, ImpossibleError) else "schema"
    return [Finding(id=problem.check or fallback, severity="error", problem=problem) for problem in error.problems]
