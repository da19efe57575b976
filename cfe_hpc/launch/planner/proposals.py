"""Where a job could run, and when: partitions, shapes of nodes and time limits, asked of Slurm and ranked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Site
from cfe_hpc.errors import ConfigError, ImpossibleError, Problem
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.planner.asking import Answer
from cfe_hpc.launch.planner.cost import billing_hours, cost_of_attempt
from cfe_hpc.launch.planner.facts import Facts
from cfe_hpc.launch.planner.obstacle import Obstacle
from cfe_hpc.launch.planner.obstacles import obstacles
from cfe_hpc.units import format_duration

__all__ = ["QUESTIONS_MAX", "SOON_S", "Proposal", "adapted", "job_changes", "judged", "proposals", "ranked"]

QUESTIONS_MAX = 16
"""Calls of `sbatch --test-only` for one job, whatever there is to choose from."""

SOON_S = 300.0
"""Starts that differ by less count as the same: the cheaper one is better then."""

_SHAPES_MAX = 3
_SHORTEST_LEADS = 4
"""A time limit that is proposed holds the signal's lead this many times."""

Ask = Callable[[Plan], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One way to run the job.

    Attributes:
        partition: the site profile's name.
        plan: None where the profile alone says that it cannot be.
        changes: keys of the job that it changes beside the partition, and to what; empty: as the job says.
        obstacles: what stands against it, the worst first.
        start_s: when it would start, in seconds since the epoch; None when nobody was asked, or it never would.
        cost: of one full attempt, in the site's currency; None when not known.
        billing_hours: what Slurm bills one full attempt: units times hours; None when not known.
        unfit: the checks of the job itself forbid it there: neither time nor shape changes that.
    """

    partition: str
    plan: Plan | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    obstacles: tuple[Obstacle, ...] = ()
    start_s: float | None = None
    cost: float | None = None
    billing_hours: float | None = None
    unfit: bool = False

    @property
    def possible(self) -> bool:
        """Whether it would ever start, as far as is known."""
        return self.plan is not None and not any(obstacle.for_ever for obstacle in self.obstacles)

    def reason(self, now_s: float) -> str:
        """What squeue will say of the job, or sbatch when it refuses it; "None" of one that starts at once."""
        if self.obstacles:
            return self.obstacles[0].reason
        return "None" if self.start_s is None or self.start_s <= now_s + 60 else "Resources"

    def as_json(self, now_s: float) -> dict[str, Any]:
        """The proposal as a JSON object."""
        chosen = self.plan
        return {
            "partition": self.partition,
            "nodes": None if chosen is None else chosen.nodes,
            "devices_per_node": None if chosen is None else chosen.devices_per_node,
            "time_s": None if chosen is None else chosen.time_s,
            "changes": dict(self.changes),
            "possible": self.possible,
            "reason": self.reason(now_s),
            "start_s": self.start_s,
            "cost": self.cost,
            "billing_hours": self.billing_hours,
            "obstacles": [obstacle.as_json() for obstacle in self.obstacles],
        }


def adapted(loaded: Loaded, **changes: Any) -> Loaded:
    """The job with other `[resources]`."""
    resources = loaded.job.resources.model_copy(update=changes)
    return replace(loaded, job=loaded.job.model_copy(update={"resources": resources}))


def proposals(loaded: Loaded, *, facts: Facts | None, ask: Ask | None, now_s: float | None = None) -> list[Proposal]:
    """Ways to run the job at its site, the best first; those that cannot be come last, each with its reasons.

    First the job as it is, in each partition that has its kind of device; then, where that does not start at once,
    shorter time limits and other shapes of as many devices.

    Args:
        facts: limits of the live Slurm; only the profile's count when None.
        ask: `sbatch --test-only`; nobody is asked when None. It is called `QUESTIONS_MAX` times at the most.
    """
    now_s = time.time() if now_s is None else now_s
    asked = 0

    def counted(planned: Plan) -> Answer | None:
        nonlocal asked
        asked += 1
        return None if ask is None or asked > QUESTIONS_MAX else ask(planned)

    plain = [judged(loaded, name, facts=facts, ask=counted, now_s=now_s) for name in _partitions(loaded)]
    found = list(plain)
    for proposal in plain:
        for changes in _variants(loaded, proposal, now_s):
            variant = judged(loaded, proposal.partition, facts=facts, ask=counted, now_s=now_s, changes=changes)
            if _gains(variant, proposal, asked=ask is not None):
                found.append(variant)
                break
    return ranked(found, loaded.site, now_s)


def judged(
    loaded: Loaded,
    partition: str,
    *,
    facts: Facts | None,
    ask: Callable[[Plan], Answer | None],
    now_s: float,
    changes: Mapping[str, Any] | None = None,
) -> Proposal:
    """The job in this partition, with these changes of `[resources]`: whether, when, at what price."""
    there = adapted(loaded, partition=partition, **(changes or {}))
    try:
        planned = plan(there.job, there.site, there.origins)
        # A variant is made of what has passed them already, and they take ten milliseconds.
        unfit = [] if changes else [*_unfit(there, planned)]
    except (ImpossibleError, ConfigError) as error:
        stated = tuple(_stated(problem) for problem in error.problems)
        return Proposal(partition=partition, plan=None, changes=changes or {}, obstacles=stated)
    found = [*unfit, *([] if facts is None else obstacles(planned, facts, now_s=now_s))]
    start_s = next((obstacle.until_s for obstacle in found if obstacle.until_s is not None), None)
    if there.site.scheduler == "local" and not found:
        start_s = now_s
    if not any(obstacle.for_ever for obstacle in found):
        answer = ask(planned)
        if answer is not None and answer.start_s is not None:
            # Slurm leaves out what only our own jobs hold up; nobody knows when they end.
            start_s = None if found and start_s is None else max(answer.start_s, start_s or 0.0)
        elif answer is not None and not found:
            found.append(_refusal(answer.refusal))
    return Proposal(
        partition=partition,
        plan=planned,
        changes=changes or {},
        obstacles=tuple(found),
        start_s=start_s,
        cost=cost_of_attempt(there, planned),
        billing_hours=billing_hours(there, planned, live_weights=_weights(planned, facts)),
        unfit=bool(unfit),
    )


def _weights(planned: Plan, facts: Facts | None) -> Mapping[str, float] | None:
    there = None if facts is None else facts.partitions.get(planned.queue)
    return None if there is None else there.weights


def ranked(found: list[Proposal], site: Site, now_s: float) -> list[Proposal]:
    """The earliest start first; of those within `SOON_S` what changes nothing, then the cheapest, then what is not
    preempted, then the profile's order."""

    def key(proposal: Proposal) -> tuple[Any, ...]:
        wait_s = float("inf") if proposal.start_s is None else max(0.0, proposal.start_s - now_s)
        preempted = proposal.plan is not None and proposal.plan.preemption.ends_attempts
        return (
            not proposal.possible,
            bool(proposal.obstacles),
            wait_s // SOON_S if wait_s != float("inf") else wait_s,
            bool(proposal.changes),
            float("inf") if proposal.cost is None else proposal.cost,
            float("inf") if proposal.billing_hours is None else proposal.billing_hours,
            preempted,
            proposal.partition != site.default_partition,
            list(site.partitions).index(proposal.partition),
        )

    return sorted(found, key=key)


def _partitions(loaded: Loaded) -> list[str]:
    """Partitions with the job's kind of device, the default one first. Not the one for debugging, unless named."""
    site, asked = loaded.site, loaded.job.resources.accelerator
    default = site.hardware[site.partitions[site.default_partition].hardware].accelerator
    names = dict.fromkeys([site.default_partition, *site.partitions])
    return [
        name
        for name in names
        if site.hardware[site.partitions[name].hardware].accelerator == (asked or default)
        and (name != site.debug_partition or len(names) == 1)
    ]


def _variants(loaded: Loaded, proposal: Proposal, now_s: float) -> Iterator[dict[str, Any]]:
    """Changes that may let the job start earlier there, or at all: the time first, for that costs nothing but further
    attempts."""
    if proposal.possible and (proposal.start_s is None or proposal.start_s <= now_s + SOON_S):
        return  # soon enough; or nobody knows, and would not know of a variant
    if proposal.unfit:
        return
    yield from _shorter(loaded, proposal)
    yield from _shapes(loaded, proposal)


def _shorter(loaded: Loaded, proposal: Proposal) -> Iterator[dict[str, Any]]:
    site, job = loaded.site, loaded.job
    asked_s = proposal.plan.time_s if proposal.plan is not None else job.resources.time
    if asked_s is None:
        return
    least_s = _SHORTEST_LEADS * max(site.slurm.signal_lead, 60.0)
    limits_s = [site.partitions[proposal.partition].time_limit, *(obstacle.time_s for obstacle in proposal.obstacles)]
    exceeded_s = [limit_s for limit_s in limits_s if limit_s is not None and asked_s > limit_s]
    shares_s = [60.0 * round(asked_s / share / 60) for share in (2, 4, 8)]
    for time_s in [min(exceeded_s)] if exceeded_s else shares_s:
        if time_s >= least_s:
            yield {"time": time_s}


def _shapes(loaded: Loaded, proposal: Proposal) -> Iterator[dict[str, Any]]:
    """As many devices, on more nodes or fewer; the nearest number of nodes first."""
    site, resources = loaded.site, loaded.job.resources
    hardware = site.hardware[site.partitions[proposal.partition].hardware]
    each = resources.devices_per_node or (1 if hardware.accelerator == "cpu" else hardware.devices_per_node)
    devices = resources.nodes * each
    nodes = [
        devices // number
        for number in range(1, hardware.devices_per_node + 1)
        if devices % number == 0 and devices // number != resources.nodes
    ]
    for count in sorted(nodes, key=lambda count: abs(count - resources.nodes))[:_SHAPES_MAX]:
        yield {"nodes": count, "devices_per_node": devices // count}


def _gains(variant: Proposal, plain: Proposal, *, asked: bool) -> bool:
    """Whether a change is worth telling: the job can start, and could not, or starts noticeably earlier.

    Args:
        asked: Slurm says when jobs start: what has no start then was refused, or one question too many.
    """
    if not variant.possible or variant.obstacles or (asked and variant.start_s is None):
        return False
    if not plain.possible or plain.start_s is None or variant.start_s is None:
        return not plain.possible
    return variant.start_s < plain.start_s - SOON_S


_ERRORS = {"account-missing": "account", "account": "account", "qos": "QOS", "model-memory": "device memory",
           "cost": "cost", "batch": "batch"}  # fmt: skip
"""Checks that tell partitions apart, and what their findings are called here."""


def _unfit(there: Loaded, planned: Plan) -> Iterator[Obstacle]:
    from cfe_hpc.launch.checks.checking import check

    for finding in check(there, planned, notes=False):
        if finding.severity == "error" and finding.id in _ERRORS:
            yield _stated(finding.problem, _ERRORS[finding.id])


_LIMITS = {"nodes": "MaxNodes", "time": "MaxTime", "qos-time": "QOS", "devices": "GRES", "memory": "memory per node",
           "accelerator": "GRES", "cores": "cores"}  # fmt: skip
"""What the profile forbids, by the id of the check, in the words of `Obstacle.limit`."""

_REASONS = {
    "MaxNodes": "PartitionNodeLimit",
    "MaxTime": "PartitionTimeLimit",
    "QOS": "QOSMaxWallDurationPerJobLimit",
    "account": "Invalid account or account/partition combination specified",
    "device memory": "the ranks run out of it",
    "cost": "resources.cost_max",
    "batch": "no rank starts",
}
_PENDS = frozenset({"MaxNodes", "MaxTime", "QOS"})


def _stated(problem: Problem, limit: str | None = None) -> Obstacle:
    """What profile and checks say, as an obstacle, with what Slurm would say if the job were sent all the same."""
    limit = limit or _LIMITS.get(problem.check or "", problem.check or "profile")
    shown = "" if problem.value is None else f" ({problem.value})"
    return Obstacle(
        limit=limit,
        reason=_REASONS.get(limit, "Requested node configuration is not available"),
        refused=limit not in _PENDS,
        for_ever=True,
        what=f"{problem.what}{shown}",
        remedy=problem.remedy,
    )


# sbatch's words, and the limit that they mean; the first that matches counts.
_WORDS = (
    (r"partition", "partition"),
    (r"account/partition|invalid account|account", "account"),
    (r"qos|policy", "QOS"),
    (r"time limit", "MaxTime"),
    (r"node count|too many nodes", "MaxNodes"),
    (r"feature", "features"),
    (r"memory", "memory per node"),
    (r"reservation", "reservation"),
    (r"array", "MaxArraySize"),
    (r"gres|generic resource", "GRES"),
)


def _refusal(words: str) -> Obstacle:
    limit = next((limit for pattern, limit in _WORDS if re.search(pattern, words, re.IGNORECASE)), "nodes")
    what = "Slurm refuses it for a reason of its own"
    remedy = "ask your site, or look at `scontrol show partition` and `scontrol show node`"
    return Obstacle(limit=limit, reason=words, refused=True, for_ever=True, what=what, remedy=f"{words}: {remedy}")


def job_changes(changes: Mapping[str, Any]) -> str:
    """Changes of a proposal as words for a command line."""
    shown = {key: format_duration(value) if key == "time" else value for key, value in changes.items()}
    return " ".join(f"--set resources.{key}={value}" for key, value in shown.items())
