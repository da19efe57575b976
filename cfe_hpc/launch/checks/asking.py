"""Checks of what is asked of the site: access, devices, cores, cost, and what its profile leaves open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cfe_hpc.config.nearest import nearest
from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts

__all__ = [
    "account_allowed",
    "account_missing",
    "array_size",
    "constraint_unknown",
    "cores_share",
    "cost_max",
    "cost_unknown",
    "gres_fixed",
    "gres_missing",
    "qos_allowed",
    "site_unverified",
    "submit_max",
    "threads",
    "whole_nodes",
]

_ASKS_FOR_DEVICES = ("--gres", "--gpus", "--gpus-per-node", "--gpus-per-task", "--tres-per-node", "--exclusive")


def account_missing(facts: Facts) -> Iterator[Problem]:
    if facts.on_slurm and facts.site.slurm.account_required and facts.plan.account is None:
        what, remedy = "every job must name an account here, and this one names none", "set account to your project's"
        yield facts.problem("job.resources.account", what, remedy)


def account_allowed(facts: Facts) -> Iterator[Problem]:
    yield from _allowed(facts, "account", facts.plan.account, facts.partition.allowed_accounts)


def qos_allowed(facts: Facts) -> Iterator[Problem]:
    yield from _allowed(facts, "qos", facts.plan.qos, facts.partition.allowed_qos)


def _allowed(facts: Facts, key: str, value: str | None, allowed: Sequence[str]) -> Iterator[Problem]:
    if value is None or not allowed or value in allowed:
        return
    near = nearest(value, allowed)
    hint = f"did you mean {near}? " if near else ""
    what = f"partition {facts.plan.partition} does not take its jobs: they would never start"
    yield facts.problem(f"job.resources.{key}", what, f"{hint}it takes: {', '.join(allowed)}", value)


def constraint_unknown(facts: Facts) -> Iterator[Problem]:
    constraint, features = facts.plan.constraint, facts.hardware.features
    if constraint is None or not features:
        return
    for name in re.findall(r"[^&|\[\]()*!]+", constraint):
        if name not in features and not name.isdigit():
            near = nearest(name, features)
            hint = f"did you mean {near}? " if near else ""
            what = f"no node of {facts.partition.hardware} has the feature {name}"
            remedy = f"{hint}the profile knows: {', '.join(features)}"
            yield facts.problem("job.resources.constraint", what, remedy, constraint)


def gres_missing(facts: Facts) -> Iterator[Problem]:
    options = facts.plan.options
    asked = facts.plan.gres is not None or any(option.split("=")[0] in _ASKS_FOR_DEVICES for option in options)
    # Who gets whole nodes gets their devices.
    if facts.on_slurm and facts.plan.accelerator != "cpu" and not asked and not facts.partition.exclusive:
        what = "devices are never asked for: where Slurm gives them out, ranks would find none"
        remedy = 'write for example gres = "gpu:{devices}"; `sinfo -o %G` tells how they are called'
        yield facts.problem(f"site.hardware.{facts.partition.hardware}.gres", what, remedy)


def gres_fixed(facts: Facts) -> Iterator[Problem]:
    spelt, devices = facts.hardware.gres, facts.plan.devices_per_node
    fixed = re.search(r":(\d+)$", spelt or "")
    if fixed is not None and int(fixed[1]) != devices:
        what = f"asks for {fixed[1]} devices on each node, and there are {devices} ranks"
        yield facts.problem(f"site.hardware.{facts.partition.hardware}.gres", what, "write {devices} instead", spelt)


def cores_share(facts: Facts) -> Iterator[Problem]:
    plan, hardware = facts.plan, facts.hardware
    share = max(1, hardware.cores_per_node // hardware.devices_per_node)
    idle = hardware.devices_per_node - plan.devices_per_node
    if facts.on_slurm and plan.accelerator != "cpu" and idle and plan.cpus_per_device > share:
        what = f"more than a device's share of {share}: other devices of the node are left without cores, and idle"
        remedy = f"ask for {share}, or for whole nodes; many sites bill the devices all the same"
        yield facts.problem("job.resources.cpus_per_device", what, remedy, plan.cpus_per_device)


def whole_nodes(facts: Facts) -> Iterator[Problem]:
    there, asked = facts.hardware.devices_per_node, facts.plan.devices_per_node
    if facts.partition.exclusive and facts.plan.accelerator != "cpu" and asked < there:
        what = f"a job gets whole nodes here, and pays for them: {there - asked} of {there} devices of each are idle"
        yield facts.problem("job.resources.devices_per_node", what, f"ask for {there}", asked)


def threads(facts: Facts) -> Iterator[Problem]:
    stated = facts.job.launch.environment.get("OMP_NUM_THREADS", "")
    cores = facts.plan.cpus_per_device
    if stated.isdigit() and int(stated) > cores:
        what = f"more threads than the {cores} cores of a rank: they wait for one another"
        remedy = "lower it, or raise resources.cpus_per_device"
        yield facts.problem("job.launch.environment.OMP_NUM_THREADS", what, remedy, stated)


def array_size(facts: Facts) -> Iterator[Problem]:
    most = facts.site.slurm.array_max
    if facts.on_slurm and most is not None and facts.tasks > most - 1:
        what = f"{facts.tasks} tasks, and an array ends below {most} here: they go out as several"
        yield facts.problem("site.slurm.array_max", what, "nothing to do: the tasks keep their numbers", most)


def submit_max(facts: Facts) -> Iterator[Problem]:
    qos = facts.site.qos.get(facts.plan.qos or "")
    if qos is not None and qos.submit_max is not None and facts.tasks > qos.submit_max:
        what = f"{facts.tasks} tasks, more jobs than QOS {facts.plan.qos} takes of one user"
        remedy = "take fewer values, or another QOS"
        yield facts.problem(f"site.qos.{facts.plan.qos}.submit_max", what, remedy, qos.submit_max)


def _cost(facts: Facts) -> float | None:
    from cfe_hpc.launch.planner.cost import cost_of_attempt

    return cost_of_attempt(facts.loaded, facts.plan)


def cost_max(facts: Facts) -> Iterator[Problem]:
    most = facts.job.resources.cost_max
    attempt = None if most is None else _cost(facts)
    if most is not None and attempt is not None and attempt * facts.tasks > most:
        each = "one full attempt costs" if facts.tasks == 1 else f"{facts.tasks} tasks, one full attempt each, cost"
        currency = f" {facts.site.cost.currency}".rstrip()
        what = f"{each} {attempt * facts.tasks:.2f}{currency}, more than is allowed"
        yield facts.problem("job.resources.cost_max", what, "ask for less time or fewer nodes, or raise it", most)


def cost_unknown(facts: Facts) -> Iterator[Problem]:
    if facts.job.resources.cost_max is not None and _cost(facts) is None:
        what = "no price or no time limit is known, so that nothing holds the job to it"
        remedy = f"set cost_per_node_hour of {facts.partition.hardware} in the site profile, and resources.time"
        yield facts.problem("job.resources.cost_max", what, remedy, facts.job.resources.cost_max)


def site_unverified(facts: Facts) -> Iterator[Problem]:
    site = facts.site
    if facts.on_slurm and site.documented_on and not site.verified:
        what = f"the profile was taken from documentation of {site.documented_on}, and nobody compared it since"
        remedy = f"run `cfe-hpc sites check {site.name}` on a login node there"
        yield facts.problem("site.verified", what, remedy)
