"""Job files: what a user wants to run, in the user's words. Sites say how it is spelt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cfe_hpc.config.base import DurationS, SizeBytes, Strict

__all__ = ["Accelerator", "Checkpoint", "Engine", "Job", "Launch", "Metrics", "Recovery", "Resources"]

Accelerator = Literal["cuda", "hpu", "cpu"]


class Resources(Strict):
    """`[resources]`: what the job asks of the site."""

    nodes: int = Field(1, ge=1, description="nodes of the run")
    devices_per_node: int | None = Field(
        None, ge=1, description="devices, and so ranks, on each node; all of the node's when left out"
    )
    cpus_per_device: int | None = Field(
        None, ge=1, description="cores for each rank; the node's cores divided among its devices when left out"
    )
    memory: SizeBytes | None = Field(None, description="memory of each node; the site's default when left out")
    time: DurationS | None = Field(None, description="time limit of one attempt; the partition's when left out")
    partition: str | None = Field(None, description="the site's default partition when left out")
    accelerator: Accelerator | None = Field(None, description="the partition's hardware decides when left out")
    account: str | None = Field(None, description="account to bill")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="node features, as the scheduler spells them")


class Launch(Strict):
    """`[launch]`: how ranks are started."""

    launcher: Literal["srun", "torchrun", "deepspeed", "ray"] = Field("srun", description="what starts the ranks")
    nodes_min: int | None = Field(None, ge=1, description="fewest nodes an elastic attempt may start on")
    environment: dict[str, str] = Field(default_factory=dict, description="variables set for every rank")


class Engine(Strict):
    """`[engine]`: what does the optimizer's step."""

    kind: Literal["deepspeed", "torch"] = Field("deepspeed", description="DeepSpeed, or plain torch with DDP")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed's ZeRO stage")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of parameters and activations in the forward")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="any DeepSpeed configuration, merged over what cfe_hpc writes"
    )


class Checkpoint(Strict):
    """`[checkpoint]`: when checkpoints are taken and which are kept."""

    every_steps: int | None = Field(None, ge=1, description="save after every so many steps")
    every: DurationS | None = Field(None, gt=0, description="save when this much time has passed since the last")
    keep_last: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_every_steps: int | None = Field(None, ge=1, description="checkpoints whose step divides by this are kept")
    keep_best: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w./-]*:(min|max)$",
        description='a logged value and its better end, "val_loss:min"',
    )
    async_: bool = Field(False, alias="async", description="write beside training")


class Recovery(Strict):
    """`[recovery]`: how often each kind of end is followed by another attempt; left out means without limit."""

    preemptions: int | None = Field(None, ge=0, description="preemptions after which the run is held")
    timeouts: int | None = Field(None, ge=0, description="time limits after which the run is held")
    node_failures: int | None = Field(None, ge=0, description="dead nodes after which the run is held")
    failures: int = Field(0, ge=0, description="crashes of the job's own that are followed by another attempt")


class Metrics(Strict):
    """`[metrics]`: where figures go while the run trains."""

    pushgateway: str | None = Field(None, description="URL of a Prometheus Pushgateway")
    port: int | None = Field(None, ge=1, le=65535, description="port of rank 0 for Prometheus to scrape")
    otlp_endpoint: str | None = Field(None, description="URL of an OpenTelemetry collector")
    every_steps: int = Field(1, ge=1, description="steps from one heartbeat line to the next")


class Job(Strict):
    """One job file."""

    name: str = Field(min_length=1, max_length=100, description="names the run folder and the scheduler's job")
    entry: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description='"package.module:function", called with the Run',
    )
    command: list[str] | None = Field(
        None, min_length=1, description='program and arguments; "{params.lr}" is replaced by the parameter'
    )
    resources: Resources = Resources()
    launch: Launch = Launch()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    metrics: Metrics = Metrics()
    params: dict[str, Any] = Field(default_factory=dict, description="handed to the entry, which validates them")
