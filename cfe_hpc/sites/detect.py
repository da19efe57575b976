"""A site profile out of a live cluster: what Slurm knows is filled in, what only people know is marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cfe_hpc.config.job import Accelerator
from cfe_hpc.config.layers import dotted
from cfe_hpc.config.problems import toml_value
from cfe_hpc.config.site import Preemption
from cfe_hpc.errors import SchedulerError
from cfe_hpc.runfolder import safe_name
from cfe_hpc.sites.live import Kind, LiveCluster, LivePartition, LiveQos
from cfe_hpc.units import format_duration

__all__ = ["partition_values", "preemption_value", "profile_text", "qos_values", "slurm_values"]

Line = tuple[str, str]
"""A line of the profile, and the remark that ends it."""

_DEBUG = re.compile(r"(^|[^a-z])(debug|dbg|devel|dev|test|interactive)([^a-z]|$)", re.IGNORECASE)
_PARTITION_REMARKS = {
    "nodes_min": "MinNodes",
    "exclusive": "OverSubscribe=EXCLUSIVE: a job gets whole nodes",
    "memory_default": "DefMemPerNode",
    "memory_per_core_default": "DefMemPerCPU",
    "memory_max": "MaxMemPerNode",
    "allowed_accounts": "AllowAccounts",
    "allowed_qos": "AllowQos",
    "billing_weights": "TRESBillingWeights; mem for each GiB",
}
_SLURM_REMARKS = {
    "kill_wait": "KillWait",
    "array_max": "MaxArraySize: indices end one below",
    "proctrack": "ProctrackType",
    "signal_children": "SignalChildrenProcesses",
    "job_requeue": "JobRequeue",
    "max_batch_requeue": "MaxBatchRequeue",
    "over_time_limit": "OverTimeLimit",
    "preempt_type": "PreemptType",
    "billing_max": "MAX_TRES in PriorityFlags",
}


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
    tables = [
        _head(cluster, name, usable),
        *(list(_partition_lines(cluster, partition, hardware)) for partition in usable),
        *(list(_hardware_lines(cluster, kind, kind_name)) for kind, kind_name in hardware.items()),
        *_qos_lines(cluster),
        _slurm_lines(cluster),
        *_unknown_tables(),
    ]
    return "\n\n".join(map(_aligned, tables)) + "\n"


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
        "billing_max": cluster.billing_max,
    }
    return {key: value for key, value in values.items() if value is not None}


def partition_values(partition: LivePartition) -> dict[str, Any]:
    """What a partition's table says of its limits and of access to it, as TOML spells it; what does not limit is
    left out."""
    values = {
        "nodes_min": partition.nodes_min if partition.nodes_min > 1 else None,
        "exclusive": partition.exclusive or None,
        "memory_default": _size(partition.memory_default_mib),
        "memory_per_core_default": _size(partition.memory_per_core_default_mib),
        "memory_max": _size(partition.memory_max_mib),
        "allowed_accounts": _list(partition.allowed_accounts),
        "allowed_qos": _list(partition.allowed_qos),
        "billing_weights": dict(partition.billing_weights) or None,
    }
    return {key: value for key, value in values.items() if value is not None}


def qos_values(qos: LiveQos) -> dict[str, Any]:
    """What a QOS's table says of its limits, as TOML spells it; what does not limit is left out."""
    values = {
        "time_limit": None if qos.time_limit_s is None else format_duration(qos.time_limit_s),
        "nodes_min": qos.nodes_min,
        "nodes_max": qos.nodes_max,
        "devices_max": qos.devices_max,
        "jobs_max": qos.jobs_max,
        "submit_max": qos.submit_max,
        "cost_factor": qos.cost_factor if qos.cost_factor != 1 else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def preemption_value(preemption: Preemption) -> dict[str, Any]:
    """A preemption table as a profile spells it, defaults left out."""
    value: dict[str, Any] = {"mode": preemption.mode}
    if preemption.mode != "off":
        value["grace"] = format_duration(preemption.grace)
    return value | ({"user_signal": True} if preemption.user_signal else {})


def _size(mib: int | None) -> str | None:
    return None if not mib else f"{mib}MiB"


def _list(names: tuple[str, ...] | None) -> list[str] | None:
    return None if names is None else list(names)


def _line(key: str, value: Any, remark: str = "") -> Line:
    return f"{key} = {toml_value(value)}", remark


def _aligned(lines: list[Line]) -> str:
    """A table's lines, its remarks below one another where the lines are short."""
    widths = [len(left) for left, remark in lines if remark and len(left) <= 40]
    width = max(widths, default=0)
    return "\n".join(f"{left:<{width}}  # {remark}" if remark else left for left, remark in lines)


def _head(cluster: LiveCluster, name: str | None, usable: list[LivePartition]) -> list[Line]:
    default = next((partition for partition in usable if partition.default), usable[0])
    lines: list[Line] = [
        ("# Found by `cfe-hpc sites detect`; `cfe-hpc sites check` compares it with the cluster again.", ""),
        ("# Look at the lines marked with ?: Slurm does not know these.", ""),
        _line("name", name or safe_name(cluster.name)),
        ('scheduler = "slurm"', ""),
        _line("description", f"cluster {cluster.name}, Slurm {cluster.version}"),
        ('contact = ""', "? who keeps this profile"),
        ('url = ""', "? the site's documentation"),
        ('tested_on = ""', "? date and version, once a run has completed there"),
        ("verified = false", "? true, once `sites check` finds nothing different after your changes"),
        _line("default_partition", default.name, "" if default.default else "? the cluster has no default one"),
    ]
    debug = next((partition.name for partition in usable if _DEBUG.search(partition.name)), None)
    if debug is None:
        lines.append(('# debug_partition = "debug"', "? where short interactive jobs start soon"))
    else:
        lines.append(_line("debug_partition", debug, "? by its name: where short interactive jobs start soon"))
    left_out = [partition.name for partition in cluster.partitions if partition not in usable]
    if left_out:
        remark = "# left out, for want of nodes or because no user's job starts there: "
        lines.append((remark + toml_value(left_out), ""))
    return lines


def _partition_lines(cluster: LiveCluster, partition: LivePartition, hardware: dict[Kind, str]) -> Iterator[Line]:
    kind, number = partition.kinds[0]
    yield f"[{dotted(('partitions', partition.name))}]", ""
    others = sum(count for _, count in partition.kinds[1:])
    yield _line(
        "hardware", hardware[kind], f"of {number} nodes; {others} others differ" if others else f"{number} nodes"
    )
    if partition.time_limit_s is not None:
        yield _line("time_limit", format_duration(partition.time_limit_s), "MaxTime")
    if partition.default_time_s is not None:
        yield _line("default_time", format_duration(partition.default_time_s), "DefaultTime")
    yield _line("nodes_max", partition.nodes_max, "of one job")
    for key, value in partition_values(partition).items():
        yield _line(key, value, _PARTITION_REMARKS[key])
    preemption = cluster.preemption(partition)
    if preemption.mode != "off":
        unread = cluster.preempt_type == "qos" and cluster.qos is None
        remark = "? its QOS decides, and sacctmgr does not tell it: `sacctmgr show qos`" if unread else ""
        yield _line("preemption", preemption_value(preemption), remark)
    if partition.needs_reservation:
        yield '# reservation = "NAME"', "? only jobs of a reservation start here"


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


def _hardware_lines(cluster: LiveCluster, kind: Kind, name: str) -> Iterator[Line]:
    yield f"[{dotted(('hardware', name))}]", ""
    yield _line("accelerator", _accelerator(kind), "" if kind.gres is None else "? cuda or hpu")
    yield _line("devices_per_node", kind.devices or kind.cores)
    yield _line("cores_per_node", kind.cores)
    yield _line("memory", f"{kind.memory_mib}MiB")
    if kind.gres is not None:
        yield _line("gres", f"{kind.gres}:{{devices}}")
    features = cluster.features.get(kind, ())
    if features:
        yield _line("features", list(features))
    if kind.gres is not None:
        yield '# device_memory = "80GB"', "? of one device: what a model is planned with"
        yield "# bf16_tflops = 989.0", "? dense, of one device: what utilisation is measured against"
    yield "# cost_per_node_hour = 1.0", "? in cost.currency"


def _accelerator(kind: Kind) -> Accelerator:
    if kind.gres is None:
        return "cpu"
    return "hpu" if "gaudi" in kind.gres.lower() or kind.gres.startswith("hpu") else "cuda"


def _qos_lines(cluster: LiveCluster) -> Iterator[list[Line]]:
    """A table for each QOS that decides something: what is done to its jobs, or what they may ask for."""
    for qos in cluster.qos or ():
        lines: list[Line] = [(f"[{dotted(('qos', qos.name))}]", "")]
        if cluster.preempt_type == "qos":
            lines.append(_line("preemption", preemption_value(cluster.qos_preemption(qos))))
        lines += [_line(key, value) for key, value in qos_values(qos).items()]
        if len(lines) > 1:
            yield lines


def _slurm_lines(cluster: LiveCluster) -> list[Line]:
    lines = [
        ("[slurm]", ""),
        ('signal_lead = "2m"', "? a step, a save and a minute; what runs measure raises it"),
        ('poll_interval = "10s"', "? shortest time between two squeue calls that the site allows"),
        *(_line(key, value, _SLURM_REMARKS.get(key, "")) for key, value in slurm_values(cluster).items()),
    ]
    if cluster.associations:
        lines.append(("account_required = false", "? true, if a job that names no account is refused"))
    return lines


def _unknown_tables() -> list[list[Line]]:
    """What Slurm has no word for."""
    return [
        [
            ("[storage]", ""),
            ('runs_root = "~/cfe_runs"', "? a folder that every node sees under this path"),
            ('node_local = "/tmp"', "? a fast folder of each node"),
            ('shared = ["~"]', "? further folders that every node sees"),
            ('# purge_after = "60d"', "? when untouched files are deleted where runs_root lies"),
            ('# quota_command = "quota -s"', "? what prints your quota there"),
        ],
        [("[network]", ""), ('# interface = "ib0"', "? for gloo, NCCL and HCCL, where the default is wrong")],
        [("[environment]", ""), ("modules = []", "? what a job script loads")],
        [("[cost]", ""), ('currency = ""', "? what prices are in")],
    ]
