"""Job files: what a user wants to run, in the user's words. Sites say how it is spelt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cfe_hpc.config.base import DurationS, NoTruth, SizeBytes, Strict
from cfe_hpc.config.checks import CHECKS
from cfe_hpc.config.node_environment import Environment
from cfe_hpc.config.sweep import Sweep

__all__ = [
    "Accelerator",
    "Checkpoint",
    "Checks",
    "Engine",
    "Job",
    "Launch",
    "Metrics",
    "Recovery",
    "Resources",
    "Snapshot",
]

Accelerator = Literal["cuda", "hpu", "cpu"]


class Resources(Strict):
    """`[resources]`: what the job asks of the site."""

    nodes: int = Field(1, ge=1, description="nodes of the run", examples=["2"])
    devices_per_node: int | None = Field(
        None,
        ge=1,
        description="devices, and so ranks, on each node; when left out all of the node's, but 1 where they are CPUs",
        examples=["8"],
    )
    cpus_per_device: int | None = Field(
        None,
        ge=1,
        description="cores for each rank; when left out a device's share of the node's",
        examples=["4"],
    )
    memory: SizeBytes | None = Field(
        None, description="memory of each node; the site's default when left out", examples=['"64GiB"']
    )
    model_parameters: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?[KMBT]?$",
        description="parameters of the model, for the estimate of memory; the training that cfe_hpc ships needs none",
        examples=['"7B"'],
    )
    time: DurationS | None = Field(
        None, description="time limit of one attempt; the partition's when left out", examples=['"4h"']
    )
    partition: str | None = Field(
        None,
        description="when left out the site's default one, or the first that has the accelerator asked for; `auto` "
        "takes the one where the job starts first: planning.md",
        examples=['"gpu"'],
    )
    accelerator: Accelerator | None = Field(
        None, description="the partition's hardware decides when left out", examples=['"cuda"']
    )
    account: str | None = Field(None, description="account to bill", examples=['"proj1"'])
    qos: str | None = Field(None, description="quality of service", examples=['"normal"'])
    constraint: str | None = Field(None, description="node features, as the scheduler spells them", examples=['"h200"'])
    cost_max: float | None = Field(
        None, gt=0, description="most that one full attempt may cost, in the site's currency", examples=["100.0"]
    )


class Launch(Strict):
    """`[launch]`: how ranks are started."""

    launcher: Literal["srun", "torchrun", "deepspeed", "ray"] = Field(
        "srun", description="what starts the ranks", examples=['"srun"']
    )
    nodes_min: int | None = Field(
        None, ge=1, description="fewest nodes an elastic attempt may start on", examples=["1"]
    )
    restarts: int = Field(
        0,
        ge=0,
        description="times that torchrun may start the ranks again inside one allocation; each counts as a failure",
        examples=["1"],
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables set for every rank", examples=['{ OMP_NUM_THREADS = "4" }']
    )


class Engine(Strict):
    """`[engine]`: what does the optimizer's step."""

    kind: Literal["deepspeed", "torch"] = Field(
        "deepspeed", description="DeepSpeed, or plain torch with DDP", examples=['"deepspeed"']
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], NoTruth] = Field(1, description="DeepSpeed's ZeRO stage", examples=["1"])
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of parameters and activations in the forward", examples=['"bf16"']
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="any DeepSpeed configuration, merged over what cfe_hpc writes",
        examples=["{ wall_clock_breakdown = true }"],
    )


class Checkpoint(Strict):
    """`[checkpoint]`: when checkpoints are taken and which are kept."""

    every_steps: int | None = Field(None, ge=1, description="save after every so many steps", examples=["100"])
    every: DurationS | None = Field(
        None, gt=0, description="save when this much time has passed since the last", examples=['"15m"']
    )
    resume_from: str | None = Field(
        None,
        min_length=1,
        description="a run folder, or the id of a run beside this one: while this run has no checkpoint of its own it "
        "begins with that one's newest",
        examples=['"runs/train-seq/train-seq-20260131-120000-12ab"'],
    )
    keep_last: int = Field(3, ge=1, description="newest checkpoints kept", examples=["3"])
    keep_every_steps: int | None = Field(
        None, ge=1, description="checkpoints whose step divides by this are kept", examples=["1000"]
    )
    keep_best: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w./-]*:(min|max)$",
        description='a logged value and its better end, "val_loss:min"',
        examples=['"val_loss:min"'],
    )
    keep_epochs: bool = Field(
        False,
        description="a checkpoint is taken at the end of each epoch (`run.end_epoch`) and kept",
        examples=["true"],
    )
    export_epochs: Literal["fp32", "bf16"] | None = Field(
        None,
        description="the weights of each of these checkpoints become a safetensors file in exports/ when the run has "
        "completed, by a job of its own on CPUs; implies `keep_epochs`",
        examples=['"bf16"'],
    )
    async_: bool = Field(
        False,
        alias="async",
        description="training waits for a copy in memory only; it is written out while training goes on",
        examples=["true"],
    )
    overlap: bool = Field(
        False,
        description="not even for the copy: what only an optimizer's step changes is copied while the next forward and "
        "backward go on, and that step waits for it; needs `async`",
        examples=["true"],
    )
    staging_memory: SizeBytes | None = Field(
        None,
        gt=0,
        description="most memory that each rank may take for that copy, beyond which training waits for the disk; "
        "as much as its part of the state when left out",
        examples=['"8GiB"'],
    )
    local: bool = Field(
        False,
        description="write to the site's `storage.node_local` first, and from there to the shared filesystem; "
        "needs `async`",
        examples=["true"],
    )
    local_keep_last: int = Field(
        1, ge=0, description="newest checkpoints that also stay on the nodes, for a fast restart", examples=["1"]
    )
    local_size: SizeBytes | None = Field(
        None,
        gt=0,
        description="most that the run may take of a node's `storage.node_local`; a checkpoint beyond that goes "
        "straight to the shared filesystem. As much as there is when left out",
        examples=['"64GiB"'],
    )
    partner: bool = Field(
        False,
        description="each node writes the next node's part, too: losing one node loses nothing; needs `local`",
        examples=["true"],
    )
    remote: str | None = Field(
        None,
        description="URL that fsspec understands; checkpoints are copied there from the shared filesystem",
        examples=['"s3://bucket/checkpoints"'],
    )
    remote_keep_last: int | None = Field(
        None, ge=1, description="newest checkpoints kept there; all when left out", examples=["5"]
    )
    remote_every_steps: int | None = Field(
        None, ge=1, description="only checkpoints whose step divides by this go there", examples=["1000"]
    )


class Recovery(Strict):
    """`[recovery]`: how often each kind of end is followed by another attempt; not set means without limit."""

    preemptions: int | None = Field(None, ge=0, description="preemptions after which the run is held", examples=["10"])
    timeouts: int | None = Field(None, ge=0, description="time limits after which the run is held", examples=["10"])
    node_failures: int | None = Field(None, ge=0, description="dead nodes after which the run is held", examples=["3"])
    failures: int = Field(
        0, ge=0, description="crashes of the job's own that are followed by another attempt", examples=["2"]
    )
    nans: int = Field(
        3,
        ge=0,
        description="roll-backs after a loss or gradient that is not finite, after which the run is held",
        examples=["3"],
    )
    nan_lr_factor: float | None = Field(
        None, gt=0, lt=1, description="the learning rate is multiplied by it after each roll-back", examples=["0.5"]
    )
    device_ooms: int = Field(
        4,
        ge=0,
        description="times that device memory may run out, each halving the micro-batch, after which the run is held",
        examples=["4"],
    )
    host_ooms: int = Field(
        1, ge=0, description="times that a node's memory may run out, after which the run is held", examples=["1"]
    )
    hangs: int = Field(
        2, ge=0, description="attempts without a sign of progress, after which the run is held", examples=["2"]
    )
    communication_errors: int = Field(
        2,
        ge=0,
        description="broken connections between ranks that nothing else explains, after which the run is held",
        examples=["2"],
    )
    disk_fulls: int = Field(
        0, ge=0, description="full disks or spent quotas after which the run is held", examples=["1"]
    )
    hang_factor: float = Field(
        30.0, gt=1, description="a step that takes this many times the median of the last ones hangs", examples=["30.0"]
    )
    hang_after: DurationS = Field(
        600.0, description='but less than this is no hang; "0s" turns the watchdog off', examples=['"10m"']
    )
    exclude_nodes_for: DurationS = Field(
        86400.0, description='how long a node that failed is avoided by all runs; "0s" is never', examples=['"24h"']
    )
    preflight: bool = Field(
        True, description="test the nodes, their devices and the network before the model is built", examples=["false"]
    )
    adapt_saves: bool = Field(
        True,
        description="save more often where a preemption's grace is shorter than a step and a save",
        examples=["false"],
    )


class Checks(Strict):
    """`[checks]`: what is looked at before the job is sent."""

    ignore: list[str] = Field(
        default_factory=list,
        description="ids of checks whose findings do not matter here",
        examples=['["git-dirty"]'],
        json_schema_extra={"items": {"type": "string", "enum": [name for name, row in CHECKS.items() if not row.firm]}},
    )


class Metrics(Strict):
    """`[metrics]`: where figures go while the run trains."""

    pushgateway: str | None = Field(
        None, description="URL of a Prometheus Pushgateway", examples=['"http://gateway:9091"']
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="port of rank 0 for Prometheus to scrape", examples=["9464"]
    )
    otlp_endpoint: str | None = Field(
        None, description="URL of an OpenTelemetry collector", examples=['"http://collector:4318"']
    )
    every_steps: int = Field(1, ge=1, description="steps from one heartbeat line to the next", examples=["100"])


class Snapshot(Strict):
    """`[snapshot]`: the code as it is at submission, kept for every attempt of the run."""

    mode: Literal["auto", "off"] = Field(
        "auto",
        description='"auto": ranks start in a copy of the git work tree that the job is submitted from, if there is '
        'one; "off": in the folder itself, as it is by then',
        examples=['"off"'],
    )
    size_max: SizeBytes = Field(
        100 * 10**6, description="most that a copy may hold; more is refused", examples=['"500MB"']
    )
    untracked_max: SizeBytes = Field(
        10**6,
        description="files that git does not track are copied up to this size each; larger ones stay where they are, "
        "and are reached through a link",
        examples=['"10MB"'],
    )


class Job(Strict):
    """One job file."""

    name: str = Field(
        min_length=1,
        max_length=100,
        description="names the run folder and the scheduler's job",
        examples=['"train-seq"'],
    )
    entry: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description='"package.module:function", called with the Run',
        examples=['"cfe_hpc.train.main:run"'],
    )
    command: list[str] | None = Field(
        None,
        min_length=1,
        description='program and arguments; "{params.lr}" is replaced by the parameter',
        examples=['["python", "train.py"]'],
    )
    resources: Resources = Field({}, validate_default=True)
    launch: Launch = Field({}, validate_default=True)
    engine: Engine = Field({}, validate_default=True)
    checkpoint: Checkpoint = Field({}, validate_default=True)
    recovery: Recovery = Field({}, validate_default=True)
    metrics: Metrics = Field({}, validate_default=True)
    environment: Environment = Field({}, validate_default=True)
    snapshot: Snapshot = Field({}, validate_default=True)
    checks: Checks = Field({}, validate_default=True)
    stage: list[dict[str, Any]] | None = Field(
        None,
        description="makes the job a pipeline: a list of tables, each with a name, what it waits for, and the keys "
        "that it changes; see pipelines.md",
        examples=['[{ name = "data" }, { name = "train", after = ["data"] }]'],
    )
    params: dict[str, Any] = Field(
        default_factory=dict, description="handed to the entry, which validates them", examples=["{ lr = 0.001 }"]
    )
    sweep: Sweep | None = Field(None)
