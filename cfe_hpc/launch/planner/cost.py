"""What an attempt costs: from the profile's price of a node, or from billing weights and the price of a unit."""

from __future__ import annotations

from collections.abc import Mapping

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Qos, Site

__all__ = ["billing_hours", "billing_units", "cost_of_attempt", "demands"]


def cost_of_attempt(loaded: Loaded, plan: Plan) -> float | None:
    """Price of one attempt that uses up its time, in the site's currency; None when price or time is unknown.

    The partition's price of a node counts before the hardware's, and both before billing weights.
    """
    site = loaded.site
    partition = site.partitions[plan.partition]
    price = partition.cost_per_node_hour
    if price is None:
        price = site.hardware[partition.hardware].cost_per_node_hour
    if price is not None:
        return None if plan.time_s is None else price * plan.nodes * plan.time_s / 3600 * _factor(site, plan)
    hours = billing_hours(loaded, plan)
    return None if hours is None or site.cost.billing_unit_hour is None else hours * site.cost.billing_unit_hour


def billing_hours(loaded: Loaded, plan: Plan, *, live_weights: Mapping[str, float] | None = None) -> float | None:
    """Billing units of one attempt that uses up its time, times hours; None where nothing is billed by units.

    Args:
        live_weights: those of the live Slurm, where the profile has none; that of memory for each GiB.
    """
    site = loaded.site
    partition = site.partitions[plan.partition]
    weights = partition.billing_weights or live_weights
    if not weights or plan.time_s is None:
        return None
    hardware = site.hardware[partition.hardware]
    whole = {"cpu": hardware.cores_per_node, "mem": hardware.memory / 2**20, "devices": hardware.devices_per_node}
    amounts = demands(plan, memory_mib=_memory_mib(loaded, plan), whole=whole if partition.exclusive else None)
    units = billing_units(weights, amounts, dearest=bool(site.slurm.billing_max))
    return units * plan.time_s / 3600 * _factor(site, plan)


def _factor(site: Site, plan: Plan) -> float:
    factor = site.qos.get(plan.qos or "", Qos()).cost_factor
    return 1.0 if factor is None else factor


def demands(plan: Plan, *, memory_mib: float | None, whole: Mapping[str, float] | None = None) -> dict[str, float]:
    """TRES of a job of this plan, over all its nodes: node, cpu, mem (MiB), gres/gpu, gres/gpu:h200.

    Args:
        memory_mib: of each node; memory is left out when None.
        whole: cpu, mem and devices of a node, where jobs get whole ones.
    """
    nodes = plan.nodes
    cores = plan.cpus_per_device * plan.devices_per_node
    devices = plan.devices_per_node
    if whole is not None:
        cores, devices, memory_mib = int(whole["cpu"]), int(whole["devices"]), whole["mem"]
    found = {"node": float(nodes), "cpu": float(nodes * cores)}
    if memory_mib is not None:
        found["mem"] = nodes * memory_mib
    if plan.gres is not None:
        name, _, rest = plan.gres.partition(":")
        kind, _, number = rest.rpartition(":")
        each = devices if whole is not None else int(number) if number.isdigit() else 1
        for key in {f"gres/{name}", f"gres/{name}:{kind}" if kind else f"gres/{name}"}:
            found[key] = float(nodes * each)
    return found


def billing_units(weights: Mapping[str, float], amounts: Mapping[str, float], *, dearest: bool) -> float:
    """Units that Slurm bills a job: the sum over its TRES, or the dearest of them alone (MAX_TRES).

    Args:
        weights: of each unit of a TRES, that of memory for each GiB.
    """
    in_gib = {name: amount / 1024 if name == "mem" else amount for name, amount in amounts.items()}
    parts = [weight * in_gib.get(name.lower(), 0.0) for name, weight in weights.items()]
    return max(parts, default=0.0) if dearest else sum(parts)


def _memory_mib(loaded: Loaded, plan: Plan) -> float | None:
    """Memory that the job is billed for on each node; None when nobody says."""
    partition = loaded.site.partitions[plan.partition]
    if plan.memory_bytes is not None:
        return plan.memory_bytes / 2**20
    if partition.memory_default is not None:
        return partition.memory_default / 2**20
    if partition.memory_per_core_default is not None:
        return partition.memory_per_core_default / 2**20 * plan.cpus_per_device * plan.devices_per_node
    return None
