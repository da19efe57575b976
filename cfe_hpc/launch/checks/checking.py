"""What is worth knowing before a job is sent: it may be well formed and planned, and still end badly."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cfe_hpc.config.checks import CHECKS, Severity
from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan
from cfe_hpc.errors import ImpossibleError, Problem, _Problems
from cfe_hpc.launch.checks import addresses, places, saving, stopping
from cfe_hpc.launch.checks.facts import Facts, Look
from cfe_hpc.recovery.measured import Measured

__all__ = ["LOOKS", "Finding", "check", "cost_of_attempt", "findings_of"]

LOOKS: dict[str, Look] = {
    "data-missing": places.data_missing,
    "runs-root": places.runs_root,
    "runs-root-private": places.runs_root_private,
    "program-missing": places.program_missing,
    "no-checkpoints": saving.no_checkpoints,
    "kept-seldom": saving.kept_seldom,
    "staging-unused": saving.staging_unused,
    "overlap-unused": saving.overlap_unused,
    "local-tier": saving.local_tier,
    "remote-tier": saving.remote_tier,
    "short-grace": stopping.short_grace,
    "preemption-contract": stopping.preemption_contract,
    "no-requeue": stopping.no_requeue,
    "elastic-batch": stopping.elastic_batch,
    "signal-at-start": stopping.signal_at_start,
    "no-time-limit": stopping.no_time_limit,
    "preemption-cancels": stopping.preemption_cancels,
    "not-yet": addresses.not_yet,
    "git-dirty": places.git_dirty,
}
"""What looks at a planned job. The other ids of `config.checks` belong to reading and planning, which raise."""


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
        fields = asdict(self.problem)
        fields.pop("check")
        return {"id": self.id, "severity": self.severity, **fields}


def check(loaded: Loaded, plan: Plan, *, measured: Measured | None = None, notes: bool = True) -> list[Finding]:
    """Run the checks that the job does not ignore, on this machine and without a scheduler; the worst findings first.

    Args:
        measured: what an earlier run of the job has measured in this partition.
        notes: run those too that only find notes.

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
        if name not in ignored and (notes or CHECKS[name].severity != "note")
        for problem in look(facts)
    ]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def findings_of(error: _Problems) -> list[Finding]:
    """What reading or planning found, as findings."""
    fallback = "impossible" if isinstance(error, ImpossibleError) else "schema"
    return [Finding(id=problem.check or fallback, severity="error", problem=problem) for problem in error.problems]


def cost_of_attempt(loaded: Loaded, plan: Plan) -> float | None:
    """Price of one attempt that uses up its time, in the site's currency; None when price or time is unknown."""
    price = loaded.site.hardware[loaded.site.partitions[plan.partition].hardware].cost_per_node_hour
    return None if price is None or plan.time_s is None else price * plan.nodes * plan.time_s / 3600
