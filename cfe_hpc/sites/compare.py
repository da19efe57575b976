"""A site profile against the live cluster: what it says that is not so, and what it could say and does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cfe_hpc.config.layers import dotted
from cfe_hpc.config.problems import toml_value
from cfe_hpc.config.site import Partition, Preemption, Qos, Site
from cfe_hpc.sites.detect import partition_values, preemption_value, qos_values, slurm_values
from cfe_hpc.sites.live import Kind, LiveCluster, LivePartition
from cfe_hpc.units import format_duration, format_size, parse_size_bytes

__all__ = ["Difference", "differences", "unstated"]

# A feature in a constraint such as "h200&nvlink" or "[rack1|rack2]*4".
_FEATURE = re.compile(r"(?<![\w.*-])[A-Za-z_][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key, and its two values as TOML spells them; None for `cluster` where it has no such thing."""

    key: str
    profile: str
    cluster: str | None


def differences(site: Site, cluster: LiveCluster) -> list[Difference]:
    """What the profile says that is not so, in its own order.

    Keys that it leaves out are not compared, nor are partitions that have no name in Slurm. What limits a job (time,
    nodes, cores, memory, devices) differs only where the profile allows more than the cluster: to allow less is a
    site's own choice.
    """
    live = {partition.name: partition for partition in cluster.partitions}
    found: list[Difference] = []
    for name, partition in site.partitions.items():
        key, queue = dotted(("partitions", name)), partition.queue_of(name)
        there = live.get(queue)
        if not queue:
            continue
        if there is None:
            found.append(Difference(key=key, profile=toml_value(queue), cluster=None))
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
        yield _differs(f"{key}.nodes_max", partition.nodes_max, there.nodes_max)
    if partition.nodes_min is not None and partition.nodes_min < there.nodes_min:
        yield _differs(f"{key}.nodes_min", partition.nodes_min, there.nodes_min)
    yield from _of_access(key, partition, there)
    yield from _of_names(f"{key}.reservation", partition.reservation, cluster.reservations)
    qos = None if cluster.qos is None else [live.name for live in cluster.qos]
    yield from _of_names(f"{key}.qos", partition.qos, qos)
    if there.kinds:
        kinds = [kind for kind, _ in there.kinds]
        offered = {feature for kind in kinds for feature in cluster.features.get(kind, ())}
        yield from _of_features(f"{key}.constraint", _FEATURE.findall(partition.constraint or ""), offered)
        yield from _of_features(
            f"{dotted(('hardware', partition.hardware))}.features",
            site.hardware[partition.hardware].features,
            offered,
        )
        yield from _of_hardware(site, partition.hardware, kinds)


def _of_access(key: str, partition: Partition, there: LivePartition) -> Iterator[Difference]:
    """Memory, sharing, and whose jobs start there, as far as the profile says so."""
    is_so = partition_values(there)
    for name in ("memory_default", "memory_per_core_default", "memory_max"):
        stated = getattr(partition, name)
        found = parse_size_bytes(is_so[name]) if name in is_so else None
        may_differ = name == "memory_max" and (found is None or (stated or 0) < found)
        if stated not in (None, found) and not may_differ:
            cluster = None if found is None else toml_value(format_size(found))
            yield Difference(key=f"{key}.{name}", profile=toml_value(format_size(stated)), cluster=cluster)
    nothing: dict[str, Any] = {"exclusive": False, "allowed_accounts": [], "allowed_qos": [], "billing_weights": {}}
    for name, otherwise in nothing.items():
        stated, found_value = getattr(partition, name), is_so.get(name, otherwise)
        if name in partition.model_fields_set and _unordered(stated) != _unordered(found_value):
            yield Difference(key=f"{key}.{name}", profile=toml_value(stated), cluster=toml_value(found_value))


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _of_names(key: str, stated: str | None, known: Iterable[str] | None) -> Iterator[Difference]:
    if stated is not None and known is not None and stated not in known:
        yield Difference(key=key, profile=toml_value(stated), cluster=None)


def _of_features(key: str, stated: Iterable[str], offered: set[str]) -> Iterator[Difference]:
    for feature in stated:
        if feature not in offered:
            yield Difference(key=key, profile=toml_value(feature), cluster=None)


def _of_hardware(site: Site, name: str, kinds: list[Kind]) -> Iterator[Difference]:
    hardware, key = site.hardware[name], dotted(("hardware", name))
    asked = None if hardware.gres is None else hardware.gres.partition(":{devices}")[0]
    kind = next((kind for kind in kinds if _is_asked_for(kind, asked)), None)
    if kind is None:
        spelt = [f"{kind.gres}:{{devices}}" for kind in kinds if kind.gres is not None]
        if asked is not None:  # without a GRES any node will do
            cluster = toml_value(spelt[0]) if spelt else None
            yield Difference(key=f"{key}.gres", profile=toml_value(hardware.gres), cluster=cluster)
        kind = kinds[0]
    if (asked is not None or hardware.request) and hardware.devices_per_node > kind.devices:
        yield _differs(f"{key}.devices_per_node", hardware.devices_per_node, kind.devices)
    if hardware.cores_per_node > kind.cores:
        yield _differs(f"{key}.cores_per_node", hardware.cores_per_node, kind.cores)
    if hardware.memory > kind.memory_mib * 2**20:
        yield _differs(f"{key}.memory", format_size(hardware.memory), format_size(kind.memory_mib * 2**20))


def _is_asked_for(kind: Kind, asked: str | None) -> bool:
    """Whether nodes of this kind answer to a GRES; one without a type, "gpu", is that of any type."""
    if kind.gres is None or asked is None:
        return kind.gres is asked
    return kind.gres == asked or kind.gres.startswith(f"{asked}:")


def _of_qos(name: str, qos: Qos, cluster: LiveCluster) -> Iterator[Difference]:
    key = dotted(("qos", name))
    there = next((live for live in cluster.qos or () if live.name == name), None)
    if there is None:
        yield Difference(key=key, profile=toml_value(name), cluster=None)
        return
    if qos.preemption is not None and cluster.preempt_type == "qos":
        yield from _of_preemption(f"{key}.preemption", qos.preemption, cluster.qos_preemption(there))
    yield from _of_time(f"{key}.time_limit", qos.time_limit, there.time_limit_s)
    is_so = qos_values(there)
    for limit in ("nodes_max", "devices_max", "jobs_max", "submit_max"):
        stated, found = getattr(qos, limit), is_so.get(limit)
        if stated is not None and found is not None and stated > found:
            yield _differs(f"{key}.{limit}", stated, found)
    if qos.nodes_min is not None and qos.nodes_min < (there.nodes_min or 1):
        yield _differs(f"{key}.nodes_min", qos.nodes_min, there.nodes_min)
    if qos.cost_factor is not None and qos.cost_factor != there.cost_factor:
        yield _differs(f"{key}.cost_factor", qos.cost_factor, there.cost_factor)


def _of_preemption(key: str, stated: Preemption, found: Preemption) -> Iterator[Difference]:
    says, is_so = preemption_value(stated), preemption_value(found)
    for part in ("mode", "grace", "user_signal"):
        # Where nobody is preempted, how it would be done means nothing.
        if says.get(part) != is_so.get(part) and (part == "mode" or "off" not in (stated.mode, found.mode)):
            profile, cluster = (toml_value(value.get(part, False)) for value in (says, is_so))
            yield Difference(key=f"{key}.{part}", profile=profile, cluster=cluster)


def _of_time(key: str, stated_s: float | None, found_s: float | None) -> Iterator[Difference]:
    if stated_s is not None and found_s is not None and stated_s > found_s:
        yield _differs(key, format_duration(stated_s), format_duration(found_s))


def _differs(key: str, profile: Any, cluster: Any) -> Difference:
    return Difference(key=key, profile=toml_value(profile), cluster=toml_value(cluster))
