"""What stands between a planned job and its start, by the limits of the live Slurm; which limit it is, and what to do.

The reasons are those that squeue of Slurm 22.05 gives; tests/test_planner_slurm.py tries each on a real one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from cfe_hpc.config.run import Plan
from cfe_hpc.launch.planner.accounts import account_of, accounting, memory_mib_of, qos_of
from cfe_hpc.launch.planner.facts import Facts, PartitionFacts, Shape
from cfe_hpc.launch.planner.obstacle import Obstacle
from cfe_hpc.units import format_duration, format_size

__all__ = ["obstacles"]

_NOT_AVAILABLE = "Requested node configuration is not available"
_NODES_AWAY = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"


def obstacles(plan: Plan, facts: Facts, *, now_s: float, tasks: int = 1) -> list[Obstacle]:
    """What stands against a job of this plan, in the order in which Slurm comes upon it; none is good.

    Args:
        now_s: seconds since the epoch.
        tasks: of an array; 1 for a plain job.
    """
    if plan.queue and plan.queue not in facts.partitions:
        known = ", ".join(sorted(facts.partitions))
        what = f"Slurm here has no partition {plan.queue}"
        return [_refused("partition", "Invalid partition name specified", what, f"it has: {known}")]
    partition = facts.partitions.get(plan.queue)
    found = [*_access(plan, facts, partition), *_array(facts, tasks)]
    if partition is not None:
        found += _nodes(plan, partition, facts)
        found += _partition_limits(plan, partition, facts)
    if facts.enforced:
        found += accounting(plan, partition, facts, tasks)
    if partition is not None and not found:
        found += _reserved(plan, partition, facts, now_s)
    # What sbatch refuses it refuses before anything pends.
    return sorted(found, key=lambda obstacle: (not obstacle.refused, not obstacle.for_ever))


def _refused(limit: str, reason: str, what: str, remedy: str) -> Obstacle:
    return Obstacle(limit=limit, reason=reason, refused=True, for_ever=True, what=what, remedy=remedy)


def _access(plan: Plan, facts: Facts, partition: PartitionFacts | None) -> Iterator[Obstacle]:
    """Who may submit there, and as what."""
    account, qos = account_of(plan, facts), qos_of(plan, facts)
    if facts.enforced and facts.allowed_qos:
        yield from _membership(account, qos, facts)
    if partition is None:
        return
    if partition.state in ("INACTIVE", "DRAIN"):
        reason = "Required partition not available (inactive or drain)"
        yield _refused("partition", reason, f"partition {partition.name} takes no jobs now", "choose another")
    if partition.state == "DOWN":
        what, remedy = f"partition {partition.name} starts no jobs now", "choose another, or wait for the site"
        yield _pends("partition", "PartitionDown", what, remedy, facts, for_ever=False)
    for limit, name, allowed, denied, reason in (
        ("account", account, partition.accounts_allowed, partition.accounts_denied, "Job's account not permitted"),
        ("QOS", qos, partition.qos_allowed, partition.qos_denied, "Job's QOS not permitted"),
    ):
        if name is not None and ((allowed and name not in allowed) or name in denied):
            what = f"partition {partition.name} is not for {limit} {name}"
            remedy = f"set resources.{limit.lower()} to one of: {', '.join(sorted(allowed))}" if allowed else "choose"
            yield _pends(limit, f"{reason} to use this partition", what, remedy, facts, for_ever=True)


def _membership(account: str | None, qos: str, facts: Facts) -> Iterator[Obstacle]:
    accounts = ", ".join(sorted(facts.allowed_qos))
    remedy = f"set resources.account to one of: {accounts}"
    reason = "Invalid account or account/partition combination specified"
    if account is None:
        if facts.accounts:  # otherwise nobody says which one is the default
            yield _refused("account", reason, "you have no default account", remedy)
    elif account not in facts.allowed_qos:
        yield _refused("account", reason, f"you are not in account {account}", remedy)
    elif qos not in facts.allowed_qos[account]:
        names = ", ".join(sorted(facts.allowed_qos[account]))
        what = f"account {account} may not use QOS {qos}"
        yield _refused("QOS", "Invalid qos specification", what, f"set resources.qos to one of: {names}")


# What sbatch says in place of squeue's reason, where EnforcePartLimits has it refuse such jobs.
_ENFORCED = {
    "PartitionNodeLimit": "Node count specification invalid",
    "PartitionTimeLimit": "Requested time limit is invalid (missing or exceeds some limit)",
    "MaxMemPerLimit": "Memory required by task is not available",
    "Job's account not permitted to use this partition": "Invalid account or account/partition combination specified",
    "Job's QOS not permitted to use this partition": "Invalid qos specification",
}


def _pends(limit: str, reason: str, what: str, remedy: str, facts: Facts | None = None, *, for_ever: bool) -> Obstacle:
    """Something that the job pends for; `facts` when it is of a partition, which a site may have refused instead."""
    refused = facts is not None and for_ever and facts.part_limits_refuse
    said = _ENFORCED.get(reason, reason) if refused else reason
    return Obstacle(limit=limit, reason=said, refused=refused, for_ever=for_ever, what=what, remedy=remedy)


def _array(facts: Facts, tasks: int) -> Iterator[Obstacle]:
    if facts.array_max is not None and tasks > facts.array_max:
        what = f"an array of {tasks} tasks, and indices end at {facts.array_max - 1}"
        remedy = "`submit --sweep` splits it; or submit fewer"
        yield _refused("MaxArraySize", "Invalid job array specification", what, remedy)


def _nodes(plan: Plan, partition: PartitionFacts, facts: Facts) -> Iterator[Obstacle]:
    """What no node of the partition has."""
    cores = plan.cpus_per_device * plan.devices_per_node
    memory_mib = memory_mib_of(plan, facts)
    shapes = partition.shapes
    name, number = _gres(plan)
    most_mib = max((shape.memory_mib for shape in shapes), default=0)
    words = re.findall(r"[\w.-]+", plan.constraint or "")
    tests = (
        ("features", _has_features(words), f"features {plan.constraint}", "set resources.constraint to what is there"),
        ("GRES", lambda shape: shape.devices.get(name, 0) >= number, f"{number} of {name}",
         f"it has {_most_devices(shapes)}: ask for fewer devices on more nodes, or mend `gres` in the profile"),
        ("cores", lambda shape: shape.cores >= cores, f"{cores} cores",
         f"it has {max((shape.cores for shape in shapes), default=0)}: lower resources.cpus_per_device"),
        ("memory per node", lambda shape: shape.memory_mib >= memory_mib, format_size(memory_mib * 2**20),
         f"it has {format_size(most_mib * 2**20)}: lower resources.memory"),
    )  # fmt: skip
    fitting = shapes
    for limit, fits, asked, remedy in tests:
        if limit == "GRES" and not number:
            continue
        left = tuple(shape for shape in fitting if fits(shape))
        if fitting and not left:
            known = {
                feature for other in facts.partitions.values() for shape in other.shapes for feature in shape.features
            }
            unknown = limit == "features" and not known.intersection(words)
            reason = "Invalid feature specification" if unknown else _NOT_AVAILABLE
            yield _refused(limit, reason, f"no node of partition {partition.name} has {asked}", remedy)
            return
        fitting = left
    wanted, there = _nodes_wanted(plan), sum(shape.nodes for shape in fitting)
    if there < wanted <= min(partition.nodes_max, len(partition.nodes)):
        what = f"{wanted} such nodes, and partition {partition.name} has {there}"
        yield _refused("nodes", _NOT_AVAILABLE, what, "ask for fewer nodes, or for less of each")
    usable = sum(shape.nodes for shape in fitting if shape.usable)
    if usable < wanted <= there:
        what = f"{usable} of {there} nodes are up"
        yield _pends("nodes", _NODES_AWAY, what, "wait for the site, or ask for fewer nodes", for_ever=False)


def _has_features(words: Sequence[str]) -> Callable[[Shape], bool]:
    # The words of an expression, whatever joins them: that one of them is there is all that is asked.
    return lambda shape: not words or bool(shape.features.intersection(words))


def _gres(plan: Plan) -> tuple[str, int]:
    """("gpu:h200", 4) of "gpu:h200:4"; ("", 0) without."""
    name, _, number = (plan.gres or "").rpartition(":")
    return (name, int(number)) if name and number.isdigit() else (plan.gres or "", 1 if plan.gres else 0)


def _most_devices(shapes: Sequence[Shape]) -> str:
    typed = {name: number for shape in shapes for name, number in shape.devices.items() if ":" in name}
    return ", ".join(f"{number} of {name}" for name, number in sorted(typed.items())) or "none"


def _nodes_wanted(plan: Plan) -> int:
    return plan.nodes_min or plan.nodes


def _partition_limits(plan: Plan, partition: PartitionFacts, facts: Facts) -> Iterator[Obstacle]:
    wanted = _nodes_wanted(plan)
    most = int(min(partition.nodes_max, len(partition.nodes)))
    name = partition.name
    if wanted > most:
        what = f"{wanted} nodes, and a job of partition {name} gets {most} at most"
        yield _pends("MaxNodes", "PartitionNodeLimit", what, f"ask for {most} nodes or fewer", facts, for_ever=True)
    if plan.nodes < partition.nodes_min:
        what = f"{plan.nodes} nodes, and a job of partition {name} takes {partition.nodes_min} at least"
        yield _pends("MinNodes", "PartitionNodeLimit", what, "ask for more, or elsewhere", facts, for_ever=True)
    if plan.time_s is not None and plan.time_s > partition.time_limit_s:
        limit = format_duration(partition.time_limit_s)
        what = f"{format_duration(plan.time_s)}, and partition {name} ends a job after {limit}"
        remedy = f'time = "{limit}": the run goes on in further attempts'
        exceeded = _pends("MaxTime", "PartitionTimeLimit", what, remedy, facts, for_ever=True)
        yield replace(exceeded, time_s=partition.time_limit_s)
    memory_mib = memory_mib_of(plan, facts)
    if memory_mib > partition.memory_max_mib:
        limit = format_size(partition.memory_max_mib * 2**20)
        what = f"{format_size(memory_mib * 2**20)} of a node, and partition {name} gives {limit}"
        yield _pends("memory per node", "MaxMemPerLimit", what, "lower resources.memory", facts, for_ever=True)
    if partition.needs_reservation and not _reservation(plan):
        what, remedy = f"partition {name} takes jobs of a reservation alone", "name one in the site profile"
        yield _refused("reservation", "Requested reservation is invalid", what, remedy)


def _reservation(plan: Plan) -> str | None:
    prefix = "--reservation="
    return next((option[len(prefix) :] for option in plan.options if option.startswith(prefix)), None)


def _reserved(plan: Plan, partition: PartitionFacts, facts: Facts, now_s: float) -> Iterator[Obstacle]:
    """Reservations that leave too few nodes for as long as the job may take."""
    end_s = math.inf if plan.time_s is None else now_s + plan.time_s
    mine = _reservation(plan)
    names = {reservation.name for reservation in facts.reservations}
    if mine is not None and not names.intersection(mine.split(",")):
        what, remedy = f"Slurm has no reservation {mine}", "mend `reservation` of the partition in the site profile"
        yield _refused("reservation", "Requested reservation is invalid", what, remedy)
        return
    others = [
        reservation
        for reservation in facts.reservations
        if reservation.name != mine and reservation.start_s < end_s and reservation.end_s > now_s
    ]
    kept: Mapping[str, float] = {}
    for reservation in sorted(others, key=lambda reservation: reservation.end_s):
        kept = {**kept, **{node: reservation.end_s for node in reservation.nodes & partition.nodes}}
    short = _nodes_wanted(plan) - (len(partition.nodes) - len(kept))
    if mine is None and short > 0:
        until_s = sorted(kept.values())[short - 1]
        named = ", ".join(reservation.name for reservation in others if reservation.nodes & partition.nodes)
        what = f"{len(kept)} of {len(partition.nodes)} nodes are kept for {named} before the job would end"
        remedy = "ask for a time that ends before it, or wait"
        starts_s = min(reservation.start_s for reservation in others if reservation.nodes & partition.nodes)
        # In steps of five minutes, and a minute to spare: it takes a while until the job is sent.
        fits_s = 300.0 * ((starts_s - now_s - 60) // 300)
        yield Obstacle(
            limit="reservation",
            reason="ReqNodeNotAvail",
            refused=False,
            for_ever=False,
            what=what,
            remedy=remedy,
            until_s=until_s,
            time_s=fits_s if fits_s > 0 else None,
        )
