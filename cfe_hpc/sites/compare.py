"""A site profile against the live cluster: what it says that is not so, and what it could say and does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cfe_hpc.config.layers import dotted
from cfe_hpc.config.problems import toml_value
from cfe_hpc.config.site import Partition, Preemption, Qos, Site
from cfe_hpc.sites.detect import preemption_value, slurm_values
from cfe_hpc.sites.live import Kind, LiveCluster, LivePartition
from cfe_hpc.units import format_duration, format_size

__all__ = ["Difference", "differences", "unstated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key, and its two values as TOML spells them; None for `cluster` where it has no such thing."""

    key: str
    profile: str
    cluster: str | None


def differences(site: Site, cluster: LiveCluster) -> list[Difference]:
    """What the profile says that is not so, in its own order.

    Keys that it leaves out are not compared. What limits a job (time, nodes, cores, memory, devices) differs only
    where the profile allows more than the cluster: to allow less is a site's own choice.
    """
    live = {partition.name: partition for partition in cluster.partitions}
    found: list[Difference] = []
    for name, partition in site.partitions.items():
        there = live.get(partition.queue or name)
        key = dotted(("partitions", name))
        if there is None:
            found.append(Difference(key=key, profile=toml_value(partition.queue or name), cluster=None))
        else:
            found += _of_partition(key, site, partition, there, cluster)
    if cluster.qos is not None:
        for name, qos in site.qos.items():
            found += _of_qos(name, qos, cluster)
    found += _of_slurm(site, cluster)
    return list(dict.fromkeys(found))  # partitions may share their hardware


def unstated(site: Site, cluster: LiveCluster) -> dict[str, str]:
    """Keys of `[slurm]` that the profile leaves out and the cluster answers, with the answers as TOML spells them."""
    return {
        f"slurm.{key}": toml_value(value)
        for key, value in slurm_values(cluster).items()
        if getattr(site.slurm, key) is None
    }


def _of_slurm(site: Site, cluster: LiveCluster) -> Iterator[Difference]:
    for key, value in slurm_values(cluster).items():
        stated = getattr(site.slurm, key)
        if stated is None:
            continue
        shown = format_duration(stated) if isinstance(stated, float) else stated
        if shown != value:
            yield Difference(key=f"slurm.{key}", profile=toml_value(shown), cluster=toml_value(value))


def _of_partition(
    key: str, site: Site, partition: Partition, there: LivePartition, cluster: LiveCluster
) -> Iterator[Difference]:
    yield from _of_preemption(f"{key}.preemption", partition.preemption, cluster.preemption(there))
    yield from _of_time(f"{key}.time_limit", partition.time_limit, there.time_limit_s)
    if partition.nodes_max is not None and partition.nodes_max > there.nodes_max:
        yield _larger(f"{key}.nodes_max", partition.nodes_max, there.nodes_max)
    if there.kinds:
        yield from _of_hardware(site, partition.hardware, [kind for kind, _ in there.kinds])


def _of_hardware(site: Site, name: str, kinds: list[Kind]) -> Iterator[Difference]:
    hardware, key = site.hardware[name], dotted(("hardware", name))
    asked = None if hardware.gres is None else hardware.gres.partition(":{devices}")[0]
    kind = next((kind for kind in kinds if kind.gres == asked), None)
    if kind is None:
        spelt = [f"{kind.gres}:{{devices}}" for kind in kinds if kind.gres is not None]
        if asked is not None:  # without a GRES any node will do
            cluster = toml_value(spelt[0]) if spelt else None
            yield Difference(key=f"{key}.gres", profile=toml_value(hardware.gres), cluster=cluster)
        kind = kinds[0]
    if asked is not None and hardware.devices_per_node > kind.devices:
        yield _larger(f"{key}.devices_per_node", hardware.devices_per_node, kind.devices)
    if hardware.cores_per_node > kind.cores:
        yield _larger(f"{key}.cores_per_node", hardware.cores_per_node, kind.cores)
    if hardware.memory > kind.memory_mib * 2**20:
        yield _larger(f"{key}.memory", format_size(hardware.memory), format_size(kind.memory_mib * 2**20))


def _of_qos(name: str, qos: Qos, cluster: LiveCluster) -> Iterator[Difference]:
    key = dotted(("qos", name))
    there = next((live for live in cluster.qos or () if live.name == name), None)
    if there is None:
        yield Difference(key=key, profile=toml_value(name), cluster=None)
        return
    if qos.preemption is not None and cluster.preempt_type == "qos":
        yield from _of_preemption(f"{key}.preemption", qos.preemption, cluster.qos_preemption(there))
    yield from _of_time(f"{key}.time_limit", qos.time_limit, there.time_limit_s)


def _of_preemption(key: str, stated: Preemption, found: Preemption) -> Iterator[Difference]:
    says, is_so = preemption_value(stated), preemption_value(found)
    for part in ("mode", "grace", "user_signal"):
        # Where nobody is preempted, how it would be done means nothing.
        if says.get(part) != is_so.get(part) and (part == "mode" or "off" not in (stated.mode, found.mode)):
            profile, cluster = (toml_value(value.get(part, False)) for value in (says, is_so))
            yield Difference(key=f"{key}.{part}", profile=profile, cluster=cluster)


def _of_time(key: str, stated_s: float | None, found_s: float | None) -> Iterator[Difference]:
    if stated_s is not None and found_s is not None and stated_s > found_s:
        yield _larger(key, format_duration(stated_s), format_duration(found_s))


def _larger(key: str, profile: Any, cluster: Any) -> Difference:
    return Difference(key=key, profile=toml_value(profile), cluster=toml_value(cluster))
