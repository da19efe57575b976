"""Site profiles: one cluster, one TOML file; how this site spells what jobs ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cfe_hpc.config.base import DurationS, SizeBytes, Strict
from cfe_hpc.config.job import Accelerator
from cfe_hpc.config.node_environment import Environment
from cfe_hpc.config.roots import DEFAULT_RUNS_ROOT, expanded

__all__ = [
    "Cost",
    "Hardware",
    "Network",
    "Partition",
    "Preemption",
    "Qos",
    "Site",
    "SiteMetrics",
    "Slurm",
    "Storage",
    "expand_runs_root",
]


class Hardware(Strict):
    """`[hardware.NAME]`: one kind of node."""

    accelerator: Accelerator = Field(description="what its devices are", examples=['"cuda"'])
    devices_per_node: int = Field(
        ge=1, description="devices of a node; for cpu, the ranks that fit on it", examples=["8"]
    )
    cores_per_node: int = Field(ge=1, description="cores that jobs may use", examples=["64"])
    memory: SizeBytes = Field(description="memory of a node that jobs may use", examples=['"512GiB"'])
    device_memory: SizeBytes | None = Field(None, description="memory of one device", examples=['"141GB"'])
    bf16_tflops: float | None = Field(None, gt=0, description="dense bf16 TFLOP/s of one device", examples=["989.0"])
    gres: str | None = Field(
        None,
        description='how devices are asked for, e.g. "gpu:h200:{devices}"; left out when they need no asking',
        examples=['"gpu:h200:{devices}"'],
    )
    request: list[str] = Field(
        default_factory=list,
        description='#SBATCH options that ask for them where `gres` is not the way; "{devices}" is their number',
        examples=['["--gpus-per-node={devices}"]'],
    )
    features: list[str] = Field(
        default_factory=list,
        description="node features that `resources.constraint` may name there",
        examples=['["h200", "nvlink"]'],
    )
    cost_per_node_hour: float | None = Field(
        None, ge=0, description="price of a node for an hour, in `cost.currency`", examples=["20.0"]
    )


class Preemption(Strict):
    """`[partitions.NAME.preemption]`: what this site does to a job it wants out of the way."""

    mode: Literal["off", "requeue", "cancel", "suspend"] = Field(
        "off", description="Slurm's PreemptMode of the partition or QOS", examples=['"requeue"']
    )
    grace: DurationS = Field(0.0, description="GraceTime: from the signal to the kill", examples=['"30s"'])
    user_signal: bool = Field(
        False, description="preempt_send_user_signal: the job's own --signal is sent instead of TERM", examples=["true"]
    )

    @property
    def ends_attempts(self) -> bool:
        """Whether a preempted attempt is ended. One that is suspended goes on later as if nothing had been."""
        return self.mode in ("requeue", "cancel")


class Qos(Strict):
    """`[qos.NAME]`: what a quality of service decides, beyond who is billed."""

    preemption: Preemption | None = Field(
        None, description="what is done to its jobs, in place of what the partition says (PreemptType=preempt/qos)"
    )
    time_limit: DurationS | None = Field(
        None, description="longest time of one attempt (MaxWall); none when left out", examples=['"8h"']
    )
    nodes_min: int | None = Field(None, ge=1, description="fewest nodes of one job (MinTRES)", examples=["2"])
    nodes_max: int | None = Field(None, ge=1, description="most nodes of one job (MaxTRES)", examples=["16"])
    devices_max: int | None = Field(None, ge=1, description="most devices of one job (MaxTRES)", examples=["64"])
    jobs_max: int | None = Field(
        None, ge=1, description="most jobs of one user that run at a time (MaxJobsPU)", examples=["8"]
    )
    submit_max: int | None = Field(
        None,
        ge=1,
        description="most jobs of one user in the queue, running ones included (MaxSubmitPU)",
        examples=["50"],
    )
    cost_factor: float | None = Field(
        None, ge=0, description="what the price is multiplied by (UsageFactor); 1 when left out", examples=["0.5"]
    )


class Partition(Strict):
    """`[partitions.NAME]`: a queue. NAME is Slurm's unless `queue` says otherwise."""

    hardware: str = Field(description="a name of [hardware]", examples=['"h200"'])
    queue: str | None = Field(
        None,
        description="the scheduler's name of it, when it is not the table's; \"\" where none is to be named",
        examples=['"gpu"'],
    )
    time_limit: DurationS | None = Field(
        None, description="longest time of one attempt; none when left out", examples=['"24h"']
    )
    default_time: DurationS | None = Field(
        None, description="time asked for when the job names none", examples=['"4h"']
    )
    nodes_max: int | None = Field(
        None, ge=1, description="most nodes of one job; the partition's size", examples=["16"]
    )
    nodes_min: int | None = Field(None, ge=1, description="fewest nodes of one job (MinNodes)", examples=["2"])
    exclusive: bool = Field(
        False, description="a job gets whole nodes, and pays for them, whatever it asks for", examples=["true"]
    )
    memory_default: SizeBytes | None = Field(
        None, description="memory of a node for a job that asks for none (DefMemPerNode)", examples=['"64GiB"']
    )
    memory_per_core_default: SizeBytes | None = Field(
        None, description="memory for each core of a job that asks for none (DefMemPerCPU)", examples=['"4GiB"']
    )
    memory_max: SizeBytes | None = Field(
        None, description="most memory of a node that a job may ask for (MaxMemPerNode)", examples=['"480GiB"']
    )
    preemption: Preemption = Field({}, validate_default=True)
    account: str | None = Field(None, description="account used when the job names none", examples=['"proj1"'])
    qos: str | None = Field(None, description="quality of service used when the job names none", examples=['"normal"'])
    constraint: str | None = Field(
        None, description="node features asked for when the job names none", examples=['"h200"']
    )
    reservation: str | None = Field(
        None, description="reservation that jobs of this partition run in", examples=['"training-week"']
    )
    allowed_accounts: list[str] = Field(
        default_factory=list,
        description="accounts whose jobs start here (AllowAccounts); all when empty",
        examples=['["proj1", "proj2"]'],
    )
    allowed_qos: list[str] = Field(
        default_factory=list,
        description="QOS whose jobs start here (AllowQos); all when empty",
        examples=['["normal"]'],
    )
    billing_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="TRESBillingWeights: billing units of each cpu, gres and node, and of each GiB of mem",
        examples=['{ cpu = 1.0, mem = 0.25, "gres/gpu" = 16.0 }'],
    )
    cost_per_node_hour: float | None = Field(
        None, ge=0, description="price of a node for an hour, where it is not the hardware's", examples=["10.0"]
    )
    options: list[str] = Field(
        default_factory=list, description='further #SBATCH options, e.g. "--exclusive"', examples=['["--exclusive"]']
    )

    def queue_of(self, name: str) -> str:
        """The scheduler's name of this partition, which the profile calls `name`; "" where a job names none."""
        return name if self.queue is None else self.queue


class Network(Strict):
    """`[network]`: how ranks find and reach each other."""

    interface: str | None = Field(None, description="interface for gloo, NCCL and HCCL, e.g. hsn0", examples=['"hsn0"'])
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables, e.g. NCCL_NET", examples=['{ NCCL_NET = "IB" }']
    )


class Storage(Strict):
    """`[storage]`: where things go."""

    runs_root: str = Field(
        DEFAULT_RUNS_ROOT,
        description="folder of all runs, on a filesystem every node sees; ~ and $VARIABLES are expanded",
        examples=['"runs"'],
    )
    node_local: str | None = Field(None, description="fast folder of each node, e.g. /tmp", examples=['"/tmp"'])
    shared: list[str] = Field(
        default_factory=list,
        description="folders that every node sees; ~ and $VARIABLES are expanded",
        examples=['["~", "$SCRATCH"]'],
    )
    purge_after: DurationS | None = Field(
        None,
        gt=0,
        description="files under `runs_root` untouched for so long are deleted by the site",
        examples=['"56d"'],
    )
    quota: SizeBytes | None = Field(
        None, gt=0, description="space that one has where `runs_root` lies", examples=['"20TB"']
    )
    quota_files: int | None = Field(None, ge=1, description="files that one may have there", examples=["1_000_000"])
    quota_command: str | None = Field(
        None, min_length=1, description="what prints one's quota, in a shell", examples=['"showquota"']
    )


class Cost(Strict):
    """`[cost]`: what prices are in, and what a billing unit costs."""

    currency: str = Field(
        "", description="what prices are in: a currency, or the site's own unit", examples=['"GPU hours"']
    )
    billing_unit_hour: float | None = Field(
        None,
        ge=0,
        description="price of a billing unit for an hour, where `billing_weights` tell a job's units",
        examples=["0.05"],
    )


class SiteMetrics(Strict):
    """`[metrics]`: defaults for the jobs' own `[metrics]`."""

    pushgateway: str | None = Field(
        None, description="URL of the site's Prometheus Pushgateway", examples=['"http://gateway:9091"']
    )
    otlp_endpoint: str | None = Field(
        None, description="URL of the site's OpenTelemetry collector", examples=['"http://collector:4318"']
    )


class Slurm(Strict):
    """`[slurm]`: settings of the whole cluster."""

    signal: Literal["USR1", "USR2"] = Field(
        "USR2", description="sent before the time limit; NCCL uses USR1 itself", examples=['"USR2"']
    )
    signal_lead: DurationS = Field(
        120.0, description="how long before the time limit it is sent, at the least", examples=['"2m"']
    )
    kill_wait: DurationS = Field(30.0, description="KillWait: from TERM at the limit to KILL", examples=['"30s"'])
    array_max: int | None = Field(None, ge=1, description="MaxArraySize; indices end one below", examples=["1001"])
    poll_interval: DurationS = Field(10.0, description="shortest time between two squeue calls", examples=['"10s"'])
    version: str | None = Field(
        None,
        pattern=r"^\d+\.\d+\S*$",
        description="as `scontrol --version` says it: it decides what becomes of a job that exits in its grace time",
        examples=['"22.05.8"'],
    )
    proctrack: str | None = Field(
        None, min_length=1, description="ProctrackType, without `proctrack/`", examples=['"cgroup"']
    )
    signal_children: bool | None = Field(
        None,
        description="SignalChildrenProcesses: true where signals reach every process of a step under proctrack/cgroup",
        examples=["false"],
    )
    job_requeue: bool | None = Field(
        None, description="JobRequeue: false where jobs are not requeued unless they ask for it", examples=["true"]
    )
    max_batch_requeue: int | None = Field(
        None, ge=0, description="requeues by Slurm itself after which it holds a job", examples=["5"]
    )
    over_time_limit: DurationS | None = Field(
        None, description="OverTimeLimit: how long a job may run past its limit", examples=['"0s"']
    )
    preempt_type: str | None = Field(
        None, min_length=1, description="PreemptType, without `preempt/`", examples=['"partition_prio"']
    )
    billing_max: bool | None = Field(
        None,
        description="MAX_TRES in PriorityFlags: a job is billed for its dearest resource alone, not for their sum",
        examples=["true"],
    )
    account_required: bool = Field(
        False, description="every job must name an account; there is no default one", examples=["true"]
    )


class Site(Strict):
    """One site profile."""

    name: str = Field(min_length=1, description="as given to --site", examples=['"mycluster"'])
    scheduler: Literal["slurm", "local"] = Field(description="what starts jobs there", examples=['"slurm"'])
    description: str = Field("", description="one line for `sites list`", examples=['"our cluster"'])
    contact: str = Field("", description="who keeps this profile", examples=['"hpc@example.org"'])
    url: str = Field("", description="the site's own documentation", examples=['"https://example.org"'])
    documentation: str = Field(
        "", description="title of the page at `url` that this was taken from", examples=['"Running jobs"']
    )
    documented_on: str = Field(
        "",
        pattern=r"^(\d{4}-\d{2}-\d{2})?$",
        description="when that page was written, or read where it bears no date",
        examples=['"2026-01-31"'],
    )
    verified: bool = Field(
        False, description="`sites check` was run on the cluster itself, and nothing differed", examples=["true"]
    )
    tested_on: str = Field(
        "",
        description="date and version this was last tried on; empty when never",
        examples=['"2026-01-31, Slurm 24.05"'],
    )
    default_partition: str = Field(description="a name of [partitions]", examples=['"gpu"'])
    debug_partition: str | None = Field(
        None, description="a name of [partitions]: where short interactive jobs start soon", examples=['"debug"']
    )
    partitions: dict[str, Partition] = Field(min_length=1)
    hardware: dict[str, Hardware] = Field(min_length=1)
    qos: dict[str, Qos] = Field(default_factory=dict)
    slurm: Slurm = Field({}, validate_default=True)
    network: Network = Field({}, validate_default=True)
    storage: Storage = Field({}, validate_default=True)
    environment: Environment = Field({}, validate_default=True)
    cost: Cost = Field({}, validate_default=True)
    metrics: SiteMetrics = Field({}, validate_default=True)


def expand_runs_root(site: Site, environ: Mapping[str, str], *, file: str | None = None) -> Path:
    """The site's runs root as an absolute path; a relative one lies under the current folder.

    Args:
        file: the profile as messages name it.

    Raises:
        ConfigError: it names a variable that is not set.
    """
    return expanded(site.storage.runs_root, environ, file=file or f"site {site.name}")
