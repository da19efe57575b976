"""The plan: what a job takes of a site. Pure arithmetic; nothing is looked up, started or written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from cfe_hpc.config.job import Job
from cfe_hpc.config.nearest import nearest
from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Hardware, Partition, Qos, Site
from cfe_hpc.errors import ConfigError, ImpossibleError, Problem
from cfe_hpc.recovery.measured import Measured, need_s, signal_lead_s
from cfe_hpc.units import format_duration, format_size

__all__ = ["AUTO", "LAUNCHERS", "plan"]

Launcher = Literal["srun", "torchrun", "deepspeed"]
LAUNCHERS: tuple[Launcher, ...] = ("srun", "torchrun", "deepspeed")
"""Launchers that this version can start ranks with."""

AUTO = "auto"
"""`resources.partition` where `launch.planner` chooses; arithmetic alone takes it for none."""

Report = Callable[..., Problem]


def plan(job: Job, site: Site, origins: Mapping[str, str] | None = None, *, measured: Measured | None = None) -> Plan:
    """What `job` takes of `site`. The same inputs give the same plan.

    Args:
        origins: `Loaded.origins`, so that errors name the file to change; "job" and "site" are named without.
        measured: what an earlier run of the job has measured there; it may have the signal sent earlier.

    Raises:
        ConfigError: the job names a partition that the site does not have.
        ImpossibleError: it could never run there; holds every reason.
    """
    report = _reporter(origins or {})
    name = _partition_name(job, site, report)
    partition = site.partitions[name]
    hardware = site.hardware[partition.hardware]
    devices = job.resources.devices_per_node or (1 if hardware.accelerator == "cpu" else hardware.devices_per_node)
    cpus = job.resources.cpus_per_device or max(1, hardware.cores_per_node // hardware.devices_per_node)
    # Slurm takes whole minutes for granted and delivers the signal up to a minute early; it is never late.
    stated_lead_s = math.ceil(site.slurm.signal_lead)
    qos_name = job.resources.qos or partition.qos
    qos = site.qos.get(qos_name or "", Qos())
    times = (job.resources.time, partition.default_time, partition.time_limit, qos.time_limit)
    time_s = next((t for t in times if t is not None), None)
    problems = [
        *_node_problems(job, site, name, devices, cpus, report),
        *_qos_problems(job, qos_name, qos, job.resources.nodes * devices, report),
        *_time_problems(f"partition {name}", partition.time_limit, time_s, report, "time"),
        *_time_problems(f"QOS {qos_name}", qos.time_limit, time_s, report, "qos-time"),
        *_lead_problems(time_s, stated_lead_s, report),
        *_launch_problems(job, report),
    ]
    problems = [problem for problem in problems if problem.check not in job.checks.ignore]
    if problems:
        raise ImpossibleError(problems)
    launcher = next(known for known in LAUNCHERS if known == job.launch.launcher)
    return Plan(
        partition=name,
        queue=partition.queue_of(name),
        nodes=job.resources.nodes,
        devices_per_node=devices,
        world_size=job.resources.nodes * devices,
        cpus_per_device=cpus,
        accelerator=hardware.accelerator,
        memory_bytes=job.resources.memory,
        time_s=time_s,
        gres=None if hardware.gres is None else hardware.gres.replace("{devices}", str(devices)),
        account=job.resources.account or partition.account,
        qos=qos_name,
        constraint=job.resources.constraint or partition.constraint,
        signal=site.slurm.signal,
        signal_lead_s=_lead_s(site, stated_lead_s, time_s, measured),
        preemption=qos.preemption or partition.preemption,
        options=[*_request(hardware, devices), *partition.options, *_reservation(partition)],
        launcher=launcher,
        nodes_min=job.launch.nodes_min,
        restarts=job.launch.restarts,
        tasks_per_node=None if launcher == "srun" else 1,
    )


def _lead_s(site: Site, stated_s: int, time_s: float | None, measured: Measured | None) -> int:
    """The site's lead, or what has been measured where that is longer; half of the time at most for it, since an
    attempt that is told to stop from its beginning gets nowhere."""
    if measured is None:
        return stated_s
    # Our own supervisor's clock has no slack.
    learned_s = signal_lead_s(measured) if site.scheduler == "slurm" else math.ceil(need_s(measured))
    return max(stated_s, int(min(learned_s, math.inf if time_s is None else time_s / 2)))


def _request(hardware: Hardware, devices: int) -> list[str]:
    return [option.replace("{devices}", str(devices)) for option in hardware.request]


def _reservation(partition: Partition) -> list[str]:
    return [] if partition.reservation is None else [f"--reservation={partition.reservation}"]


def _reporter(origins: Mapping[str, str]) -> Report:
    def report(key: str, what: str, remedy: str, value: Any = None, *, check: str) -> Problem:
        owner, _, rest = key.partition(".")
        origin = origins.get(key, "default")
        file = owner if origin == "default" else origin
        return Problem(file=file, key=rest, what=what, value=value, remedy=remedy, check=check)

    return report


def _partition_name(job: Job, site: Site, report: Report) -> str:
    """The partition asked for, or the default one, or the first with the accelerator asked for."""
    asked, accelerator = job.resources.partition, job.resources.accelerator
    if asked is not None and asked in site.partitions:
        return asked
    if asked is not None and asked != AUTO:
        near = nearest(asked, site.partitions)
        hint = f"did you mean {near}? " if near else ""
        remedy = f"{hint}{site.name} has: {', '.join(site.partitions)}"
        what = f"no such partition at {site.name}"
        raise ConfigError([report("job.resources.partition", what, remedy, asked, check="partition")])
    candidates = [site.default_partition, *site.partitions]
    fitting = (
        name for name in candidates if accelerator in (None, site.hardware[site.partitions[name].hardware].accelerator)
    )
    return next(fitting, site.default_partition)


def _node_problems(job: Job, site: Site, name: str, devices: int, cpus: int, report: Report) -> Iterator[Problem]:
    wanted, partition = job.resources, site.partitions[name]
    hardware = site.hardware[partition.hardware]
    may_oversubscribe = site.scheduler == "local" and wanted.cpus_per_device is None
    if wanted.accelerator not in (None, hardware.accelerator):
        what = f"partition {name} has {hardware.accelerator} devices"
        yield report(
            "job.resources.accelerator",
            what,
            "choose another partition or site",
            wanted.accelerator,
            check="accelerator",
        )
    if partition.nodes_max is not None and wanted.nodes > partition.nodes_max:
        what, remedy = f"more than the {partition.nodes_max} nodes of partition {name}", "ask for fewer"
        yield report("job.resources.nodes", what, remedy, wanted.nodes, check="nodes")
    if partition.nodes_min is not None and wanted.nodes < partition.nodes_min:
        what, remedy = f"fewer than the {partition.nodes_min} nodes that partition {name} wants", "ask for more"
        yield report("job.resources.nodes", what, remedy, wanted.nodes, check="nodes")
    if devices > hardware.devices_per_node:
        what = f"more than the {hardware.devices_per_node} devices of a node of {partition.hardware}"
        yield report("job.resources.devices_per_node", what, "ask for fewer, on more nodes", devices, check="devices")
    elif cpus * devices > hardware.cores_per_node and not may_oversubscribe:
        what = f"{devices} ranks with {cpus} cores each, more than the {hardware.cores_per_node} of a node"
        yield report("job.resources.cpus_per_device", what, "ask for fewer", cpus, check="cores")
    most = min(hardware.memory, partition.memory_max or hardware.memory)
    if wanted.memory is not None and wanted.memory > most:
        whose = f"node of {partition.hardware}" if most == hardware.memory else f"node in partition {name}"
        what = f"more than the {format_size(most)} of a {whose}"
        yield report("job.resources.memory", what, "ask for less", format_size(wanted.memory), check="memory")


def _qos_problems(job: Job, name: str | None, qos: Qos, devices: int, report: Report) -> Iterator[Problem]:
    nodes = job.resources.nodes
    if qos.nodes_max is not None and nodes > qos.nodes_max:
        what, remedy = f"more than the {qos.nodes_max} nodes of QOS {name}", "ask for fewer, or choose another QOS"
        yield report("job.resources.nodes", what, remedy, nodes, check="nodes")
    if qos.nodes_min is not None and nodes < qos.nodes_min:
        what, remedy = f"fewer than the {qos.nodes_min} nodes that QOS {name} wants", "choose another QOS"
        yield report("job.resources.nodes", what, remedy, nodes, check="nodes")
    if qos.devices_max is not None and devices > qos.devices_max:
        what, remedy = f"more than the {qos.devices_max} devices of QOS {name}", "ask for fewer, or choose another QOS"
        yield report("job.resources.devices_per_node", what, remedy, devices, check="devices")


def _time_problems(
    whose: str, time_limit: float | None, time_s: float | None, report: Report, check: str
) -> Iterator[Problem]:
    if time_limit is not None and time_s is not None and time_s > time_limit:
        what = f"longer than the {format_duration(time_limit)} of {whose}"
        remedy = "ask for less: the run goes on in further attempts"
        yield report("job.resources.time", what, remedy, format_duration(time_s), check=check)


def _lead_problems(time_s: float | None, lead_s: int, report: Report) -> Iterator[Problem]:
    if time_s is not None and time_s <= lead_s:
        what = f"too short: slurm.signal_lead has the signal sent {format_duration(lead_s)} before its end"
        remedy = f"ask for more than {format_duration(lead_s)}"
        yield report("job.resources.time", what, remedy, format_duration(time_s), check="signal-lead")


def _launch_problems(job: Job, report: Report) -> Iterator[Problem]:
    launch = job.launch
    if launch.launcher not in LAUNCHERS:
        remedy = f"this version starts ranks with {', '.join(LAUNCHERS)}"
        yield report("job.launch.launcher", "not available yet", remedy, launch.launcher, check="launcher")
