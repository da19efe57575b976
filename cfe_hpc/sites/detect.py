"""A site profile out of a live cluster: what Slurm knows is filled in, what only people know is marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cfe_hpc.config.job import Accelerator
from cfe_hpc.config.layers import dotted
from cfe_hpc.config.problems import toml_value
from cfe_hpc.config.site import Preemption
from cfe_hpc.errors import SchedulerError
from cfe_hpc.runfolder import safe_name
from cfe_hpc.sites.live import Kind, LiveCluster, LivePartition
from cfe_hpc.units import format_duration

__all__ = ["preemption_value", "profile_text", "slurm_values"]


def profile_text(cluster: LiveCluster, name: str | None = None) -> str:
    """A profile in TOML that `load_site` takes. Partitions that have no nodes, or where no job of a plain user
    starts, are left out and named in a remark.

    Args:
        name: of the site; the cluster's own when None.

    Raises:
        SchedulerError: no partition is left.
    """
    usable = [partition for partition in cluster.partitions if partition.open and partition.kinds]
    if not usable:
        raise SchedulerError(f"cluster {cluster.name}: has no partition that jobs may start in; look with sinfo")
    hardware = _hardware_names(usable)
    default = next((partition for partition in usable if partition.default), usable[0])
    lines = [
        "# Found by `cfe-hpc sites detect`; `cfe-hpc sites check` compares it with the cluster again.",
        "# Look at the lines marked with ?: Slurm does not know these.",
        _line("name", name or safe_name(cluster.name)),
        'scheduler = "slurm"',
        _line("description", f"cluster {cluster.name}, Slurm {cluster.version}"),
        'contact = ""              # ? who keeps this profile',
        'tested_on = ""            # ? date and version, once a run has completed there',
        _line("default_partition", default.name),
    ]
    left_out = [partition.name for partition in cluster.partitions if partition not in usable]
    if left_out:
        lines.append(f"# left out, for want of nodes or because no user's job starts there: {toml_value(left_out)}")
    for partition in usable:
        lines += ["", *_partition_lines(cluster, partition, hardware)]
    for kind, kind_name in hardware.items():
        lines += ["", *_hardware_lines(kind, kind_name)]
    lines += [line for qos_lines in _qos_lines(cluster) for line in ("", *qos_lines)]
    lines += ["", "[slurm]", 'signal_lead = "2m"        # ? a step, a save and a minute; what runs measure raises it']
    lines += [_line(key, value) for key, value in slurm_values(cluster).items()]
    lines += [
        "",
        "[storage]",
        'runs_root = "~/cfe_runs"  # ? a folder that every node sees under this path',
        'node_local = "/tmp"       # ? a fast folder of each node',
        "",
        "[environment]",
        "modules = []              # ? what a job script loads",
        "",
    ]
    return "\n".join(lines)


def slurm_values(cluster: LiveCluster) -> dict[str, Any]:
    """What `[slurm]` of a profile says of the cluster, as TOML spells it; keys that are not known are left out."""
    values = {
        "kill_wait": format_duration(cluster.kill_wait_s),
        "array_max": cluster.array_max,
        "version": cluster.version,
        "proctrack": cluster.proctrack,
        "signal_children": cluster.signal_children,
        "job_requeue": cluster.job_requeue,
        "max_batch_requeue": cluster.max_batch_requeue,
        "over_time_limit": None if cluster.over_time_limit_s is None else format_duration(cluster.over_time_limit_s),
        "preempt_type": cluster.preempt_type,
    }
    return {key: value for key, value in values.items() if value is not None}


def preemption_value(preemption: Preemption) -> dict[str, Any]:
    """A preemption table as a profile spells it, defaults left out."""
    value: dict[str, Any] = {"mode": preemption.mode}
    if preemption.mode != "off":
        value["grace"] = format_duration(preemption.grace)
    return value | ({"user_signal": True} if preemption.user_signal else {})


def _line(key: str, value: Any) -> str:
    return f"{key} = {toml_value(value)}"


def _partition_lines(cluster: LiveCluster, partition: LivePartition, hardware: dict[Kind, str]) -> Iterator[str]:
    kind, number = partition.kinds[0]
    yield f"[{dotted(('partitions', partition.name))}]"
    others = sum(count for _, count in partition.kinds[1:])
    remark = f"  # of {number} nodes; {others} others differ" if others else ""
    yield _line("hardware", hardware[kind]) + remark
    if partition.time_limit_s is not None:
        yield _line("time_limit", format_duration(partition.time_limit_s))
    if partition.default_time_s is not None:
        yield _line("default_time", format_duration(partition.default_time_s))
    yield _line("nodes_max", partition.nodes_max)
    preemption = cluster.preemption(partition)
    if preemption.mode != "off":
        unread = cluster.preempt_type == "qos" and cluster.qos is None
        remark = "  # ? its QOS decides, and sacctmgr does not tell it: `sacctmgr show qos`" if unread else ""
        yield _line("preemption", preemption_value(preemption)) + remark


def _hardware_names(partitions: list[LivePartition]) -> dict[Kind, str]:
    """A name for each kind of node that a partition has most of."""
    names: dict[Kind, str] = {}
    for partition in partitions:
        kind = partition.kinds[0][0]
        stem = safe_name((kind.gres or "cpu").rpartition(":")[2])
        taken = set(names.values())
        number = 1
        while (name := stem if number == 1 else f"{stem}-{number}") in taken:
            number += 1
        names.setdefault(kind, name)
    return names


def _hardware_lines(kind: Kind, name: str) -> Iterator[str]:
    yield f"[{dotted(('hardware', name))}]"
    yield _line("accelerator", _accelerator(kind)) + ("" if kind.gres is None else "  # ? cuda or hpu")
    yield _line("devices_per_node", kind.devices or kind.cores)
    yield _line("cores_per_node", kind.cores)
    yield _line("memory", f"{kind.memory_mib}MiB")
    if kind.gres is not None:
        yield _line("gres", f"{kind.gres}:{{devices}}")


def _accelerator(kind: Kind) -> Accelerator:
    if kind.gres is None:
        return "cpu"
    return "hpu" if "gaudi" in kind.gres.lower() or kind.gres.startswith("hpu") else "cuda"


def _qos_lines(cluster: LiveCluster) -> Iterator[list[str]]:
    """A table for each QOS that decides something: what is done to its jobs, or how long they may take."""
    for qos in cluster.qos or ():
        lines = [f"[{dotted(('qos', qos.name))}]"]
        if cluster.preempt_type == "qos":
            lines.append(_line("preemption", preemption_value(cluster.qos_preemption(qos))))
        if qos.time_limit_s is not None:
            lines.append(_line("time_limit", format_duration(qos.time_limit_s)))
        if len(lines) > 1:
            yield lines
