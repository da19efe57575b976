"""Limits of QOS and accounts, and which of them a job exceeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from cfe_hpc.config.run import Plan
from cfe_hpc.launch.planner.cost import billing_units, demands
from cfe_hpc.launch.planner.facts import Facts, Limits, PartitionFacts, Use
from cfe_hpc.launch.planner.obstacle import Obstacle
from cfe_hpc.units import format_duration, format_size

__all__ = ["account_of", "accounting", "memory_mib_of", "qos_of"]


def account_of(plan: Plan, facts: Facts) -> str | None:
    """Who pays for a job of this plan; None when that is not known."""
    return plan.account or facts.default_account


def qos_of(plan: Plan, facts: Facts) -> str:
    """The QOS of a job of this plan; most sites call the default one "normal"."""
    return plan.qos or facts.default_qos.get(account_of(plan, facts) or "", "normal")


def memory_mib_of(plan: Plan, facts: Facts) -> float:
    """Memory that the job takes of each node; 0 when nobody says."""
    if plan.memory_bytes is not None:
        return math.ceil(plan.memory_bytes / 2**20)
    return (facts.memory_per_core_mib or 0.0) * plan.cpus_per_device * plan.devices_per_node


# Slurm's words for a limit on each TRES, of one job, of a user's jobs, and of all jobs of a QOS or account.
_JOB_WORDS = {
    "QOS": {"node": "QOSMaxNodePerJobLimit", "cpu": "QOSMaxCpuPerJobLimit", "mem": "QOSMaxMemoryPerJob",
            "billing": "QOSMaxBillingPerJob", "gres": "QOSMaxGRESPerJob"},
    "Assoc": {"node": "AssocMaxNodePerJobLimit", "cpu": "AssocMaxCpuPerJobLimit", "mem": "AssocMaxMemPerJob",
              "billing": "AssocMaxBillingPerJob", "gres": "AssocMaxGRESPerJob"},
}  # fmt: skip
_USER_WORDS = {"node": "QOSMaxNodePerUserLimit", "cpu": "QOSMaxCpuPerUserLimit", "mem": "QOSMaxMemoryPerUser",
               "billing": "QOSMaxBillingPerUser", "gres": "QOSMaxGRESPerUser"}  # fmt: skip
_GROUP_WORDS = {
    "QOS": {"node": "QOSGrpNodeLimit", "cpu": "QOSGrpCpuLimit", "mem": "QOSGrpMemLimit",
            "billing": "QOSGrpBilling", "gres": "QOSGrpGRES"},
    "Assoc": {"node": "AssocGrpNodeLimit", "cpu": "AssocGrpCpuLimit", "mem": "AssocGrpMemLimit",
              "billing": "AssocGrpBilling", "gres": "AssocGrpGRES"},
}  # fmt: skip
_LEAST_WORDS = {"node": "QOSMinNode", "cpu": "QOSMinCpuNotSatisfied", "mem": "QOSMinMemory",
                "billing": "QOSMinBilling", "gres": "QOSMinGRES"}  # fmt: skip


def accounting(plan: Plan, partition: PartitionFacts | None, facts: Facts, tasks: int) -> Iterator[Obstacle]:
    """Limits of QOS and accounts. The partition's QOS counts before the job's, both before the accounts', and what one
    of them limits no later one does; only groups of jobs are limited at every account above."""
    names = [partition.qos if partition is not None else None, qos_of(plan, facts)]
    qos = [facts.qos[name] for name in dict.fromkeys(names) if name is not None and name in facts.qos]
    accounts = list(facts.accounts.get(account_of(plan, facts) or "", ()))
    layers = [*qos, *accounts]
    amounts = demands(plan, memory_mib=memory_mib_of(plan, facts) or None)
    if partition is not None:
        amounts["billing"] = billing_units(partition.weights, amounts, dearest=facts.billing_max)
    yield from _wall(plan, layers)
    for tres, amount in amounts.items():
        for limits, words, use in _that_hold(tres, qos, accounts):
            if amount + use.used > use.limit:
                yield _exceeds(limits, words[_kind(tres)], tres, amount, use)
        for limits in qos:
            if amount < limits.job_min.get(tres, 0.0):
                what = f"{_shown(tres, amount)}, and {limits.owner} takes {_shown(tres, limits.job_min[tres])} at least"
                yield _of(limits, _LEAST_WORDS[_kind(tres)], what, "ask for more, or use another QOS")
    yield from _jobs(layers, tasks)


def _that_hold(
    tres: str, qos: Sequence[Limits], accounts: Sequence[Limits]
) -> Iterator[tuple[Limits, Mapping[str, str], Use]]:
    """(whose, Slurm's words, limit and use) of each limit on this TRES that counts for a job."""
    for limits in [limits for limits in (*qos, *accounts) if tres in limits.job_max][:1]:
        yield limits, _JOB_WORDS[limits.kind], Use(limit=limits.job_max[tres])
    for limits in [limits for limits in qos if tres in limits.user_max][:1]:
        yield limits, _USER_WORDS, limits.user_max[tres]
    for limits in [limits for limits in qos if tres in limits.group_max][:1] or accounts:
        if tres in limits.group_max:
            yield limits, _GROUP_WORDS[limits.kind], limits.group_max[tres]


def _kind(tres: str) -> str:
    return "gres" if tres.startswith("gres/") else tres


def _wall(plan: Plan, layers: Sequence[Limits]) -> Iterator[Obstacle]:
    for limits in [limits for limits in layers if math.isfinite(limits.wall_s)][:1]:
        if plan.time_s is not None and plan.time_s > limits.wall_s:
            limit = format_duration(limits.wall_s)
            what = f"{format_duration(plan.time_s)}, and {limits.owner} ends a job after {limit}"
            remedy = f'time = "{limit}": the run goes on in further attempts'
            exceeded = _of(limits, f"{limits.kind}MaxWallDurationPerJobLimit", what, remedy)
            yield replace(exceeded, time_s=limits.wall_s)


def _jobs(layers: Sequence[Limits], tasks: int) -> Iterator[Obstacle]:
    for limits in layers:
        submit, jobs = limits.submit_max, limits.jobs_max
        if submit is not None and submit.used + tasks > submit.limit:
            what = f"{limits.owner} takes {submit.limit:.0f} jobs of yours, {submit.used:.0f} are in the queue"
            yield Obstacle(
                limit=_limit_name(limits),
                reason="Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
                refused=True,
                for_ever=tasks > submit.limit,
                what=what,
                remedy="wait for some to end",
            )
        if jobs is not None and jobs.used + 1 > jobs.limit:
            word = "QOSMaxJobsPerUserLimit" if limits.kind == "QOS" else "AssocMaxJobsLimit"
            what = f"{limits.owner} lets {jobs.limit:.0f} jobs of yours run at a time"
            yield _of(limits, word, what, "wait for one to end", for_ever=jobs.limit == 0)


def _exceeds(limits: Limits, word: str, tres: str, amount: float, use: Use) -> Obstacle:
    used = f", {_shown(tres, use.used)} of it in use" if use.used else ""
    what = f"{_shown(tres, amount)}, and {limits.owner} allows {_shown(tres, use.limit)}{used}"
    if amount > use.limit:
        return _of(
            limits, word, what, f"ask for {_shown(tres, use.limit)} or less, or use another {_limit_name(limits)}"
        )
    return _of(limits, word, what, "wait for other jobs to end", for_ever=False)


def _of(limits: Limits, word: str, what: str, remedy: str, *, for_ever: bool = True) -> Obstacle:
    refused = limits.refuses and for_ever
    return Obstacle(
        limit=_limit_name(limits), reason=word, refused=refused, for_ever=for_ever, what=what, remedy=remedy
    )


def _limit_name(limits: Limits) -> str:
    return "QOS" if limits.kind == "QOS" else "account"


def _shown(tres: str, amount: float) -> str:
    return format_size(amount * 2**20) if tres == "mem" else f"{amount:g} {tres}"
