"""How much memory a job takes, of each device and of each node, before anything of it runs. Arithmetic alone.

P is the number of parameters, N the number of ranks. Bytes of the model's states are those of ZeRO (Rajbhandari et
al., arXiv 1910.02054, section 3) for Adam, with what DeepSpeed's own estimators add: a partition of the gradients in
fp32 while the optimizer steps (`estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`,
deepspeed.readthedocs.io/en/latest/memory.html). Each coefficient was held against tensors counted in real ranks;
docs/planning.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Literal, NamedTuple

from cfe_hpc.config.environment import TRAIN_ENTRY
from cfe_hpc.config.job import Engine, Job
from cfe_hpc.config.run import Plan
from cfe_hpc.units import parse_count

__all__ = ["CHECKPOINT_BYTES", "MemoryEstimate", "Part", "estimate"]

CHECKPOINT_BYTES = 12
"""Of a parameter in a checkpoint, whatever the engine: fp32 weights (DeepSpeed's masters) and Adam's two moments."""

_REDUCE_BUCKET = 500_000_000
_PREFETCH_BUCKET = 50_000_000
"""DeepSpeed's defaults, in elements (zero_optimization.reduce_bucket_size and stage3_prefetch_bucket_size)."""

_OUR_REDUCE_BUCKET = 50_000_000
"""What the training that cfe_hpc ships sets instead."""

_CPU_PROCESS_BYTES = 512 * 2**20
"""A rank's own: Python, torch and DeepSpeed; 380 to 510 MiB were measured on CPUs."""

_ACCELERATOR_PROCESS_BYTES = 2 * 2**30
"""The same with an accelerator's libraries; assumed, not measured."""

_CONTEXT_BYTES = 2**30
"""Of a device: its context and the communication's buffers; assumed, not measured."""


# Tuples: every `submit` loads this, and a dataclass takes half a millisecond to be made.
class Part(NamedTuple):
    """One thing that takes memory on every rank.

    Attributes:
        name: what it is, in a word or two.
        how: how it was reckoned: "4 B x P / N".
        where: the rank's device, or its node's memory.
    """

    name: str
    size_bytes: int
    how: str
    where: Literal["device", "node"]


class MemoryEstimate(NamedTuple):
    """What a job takes at its peak.

    Attributes:
        parameters: elements of the model.
        parts: of one rank.
        complete: whether activations are among them; they are known for the training that cfe_hpc ships alone.
    """

    parameters: int
    parts: tuple[Part, ...]
    ranks_per_node: int
    complete: bool

    @property
    def device_bytes(self) -> int:
        """Of each device; 0 where ranks compute on CPUs: all of it is the node's then."""
        return sum(part.size_bytes for part in self.parts if part.where == "device")

    @property
    def node_bytes(self) -> int:
        """Of each node's own memory, over its ranks."""
        return self.ranks_per_node * sum(part.size_bytes for part in self.parts if part.where == "node")

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint, all ranks' shards together."""
        return CHECKPOINT_BYTES * self.parameters

    def as_json(self) -> dict[str, Any]:
        """The estimate as a JSON object."""
        return {
            "parameters": self.parameters,
            "device_bytes": self.device_bytes,
            "node_bytes": self.node_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "complete": self.complete,
            "parts": [
                {"name": part.name, "bytes": part.size_bytes, "how": part.how, "where": part.where}
                for part in self.parts
            ],
        }


def estimate(job: Job, plan: Plan) -> MemoryEstimate | None:
    """What `job` takes when it runs as planned; None when nothing tells how large its model is.

    The training that cfe_hpc ships tells it by its `[params]`, any other job by `resources.model_parameters`.

    Raises:
        ConfigError: the `[params]` of the shipped training are wrong.
    """
    if job.entry == TRAIN_ENTRY:
        # By dotted name: launch and train are neighbours that may not import one another.
        size = import_module("cfe_hpc.train.size")
        params = import_module("cfe_hpc.train.config").read_params(job.params, file="job")
        arithmetic = {"fp32": "fp32", "bf16": "autocast" if job.engine.kind == "torch" else "bf16"}
        activations = size.activation_bytes(
            params, micro_batch=params.micro_batch, arithmetic=arithmetic[job.engine.precision]
        )
        return _estimate(job, plan, size.parameter_count(params), size.largest_layer(params), activations)
    stated = job.resources.model_parameters
    return None if stated is None else _estimate(job, plan, parse_count(stated), 0, None)


def _estimate(
    job: Job, plan: Plan, parameters: int, largest_layer: int, activations_bytes: int | None
) -> MemoryEstimate:
    on_cpu = plan.accelerator == "cpu"
    device: Literal["device", "node"] = "node" if on_cpu else "device"
    parts = list(_states(job, parameters, plan.world_size, device))
    parts += _buffers(job, parameters, plan.world_size, largest_layer, device)
    if activations_bytes is not None:
        how = "what the backward of a micro-batch needs of its forward"
        parts.append(Part(name="activations", size_bytes=activations_bytes, how=how, where=device))
    if job.checkpoint.async_:
        share = -(-CHECKPOINT_BYTES * parameters // plan.world_size)
        staged = min(share, job.checkpoint.staging_memory or share)
        how = f"{CHECKPOINT_BYTES} B x P / N, at most checkpoint.staging_memory"
        parts.append(Part(name="copy for checkpoints", size_bytes=staged, how=how, where="node"))
    if on_cpu:
        parts.append(Part(name="process", size_bytes=_CPU_PROCESS_BYTES, how="measured", where="node"))
    else:
        parts.append(Part(name="context", size_bytes=_CONTEXT_BYTES, how="assumed", where="device"))
        parts.append(Part(name="process", size_bytes=_ACCELERATOR_PROCESS_BYTES, how="assumed", where="node"))
    return MemoryEstimate(
        parameters=parameters,
        parts=tuple(parts),
        ranks_per_node=plan.devices_per_node,
        complete=activations_bytes is not None,
    )


class _Coefficients(NamedTuple):
    """Bytes of a parameter for each state, and whether the ranks share it out among themselves."""

    weights: tuple[int, bool]
    gradients: tuple[int, bool]
    gradients_fp32: tuple[int, bool]
    optimizer: tuple[int, bool]


def _coefficients(engine: Engine) -> _Coefficients:
    wide = engine.precision == "fp32"
    if engine.kind == "torch":  # autocast leaves weights and gradients in fp32, and needs no masters
        return _Coefficients(weights=(4, False), gradients=(4, False), gradients_fp32=(0, False), optimizer=(8, False))
    stage, width = engine.zero_stage, 4 if wide else 2
    return _Coefficients(
        weights=(width, stage == 3),
        gradients=(width, stage >= 2),
        # Even of gradients that are in fp32 ZeRO makes a copy for the step.
        gradients_fp32=(0 if wide and stage == 0 else 4, stage >= 1),
        # ZeRO keeps masters of its own even where the weights are fp32 themselves.
        optimizer=(8 if wide and stage == 0 else 12, stage >= 1),
    )


def _states(job: Job, parameters: int, ranks: int, device: Literal["device", "node"]) -> Iterator[Part]:
    coefficients, zero = _coefficients(job.engine), _zero(job.engine)
    # Offloaded gradients go where the optimizer's step is done.
    optimizer_at = "node" if _offloads(zero, "offload_optimizer") else device
    weights_at = "node" if _offloads(zero, "offload_param") else device
    for name, (width, shared), where in (
        ("weights", coefficients.weights, weights_at),
        ("gradients", coefficients.gradients, device),
        ("gradients in fp32", coefficients.gradients_fp32, optimizer_at),
        ("optimizer", coefficients.optimizer, optimizer_at),
    ):
        if width:
            size_bytes = -(-width * parameters // (ranks if shared else 1))
            yield Part(
                name=name,
                size_bytes=size_bytes,
                how=f"{width} B x P" + (" / N" if shared else ""),
                where="node" if where == "node" else "device",
            )


def _buffers(
    job: Job, parameters: int, ranks: int, largest_layer: int, device: Literal["device", "node"]
) -> Iterator[Part]:
    """What gradients and gathered weights pass through."""
    engine, zero = job.engine, _zero(job.engine)
    if ranks == 1:
        return
    width = 4 if engine.precision == "fp32" else 2
    if engine.kind == "torch":
        # Without gradient_as_bucket_view DDP reduces a copy of them all.
        yield Part(name="DDP's buckets", size_bytes=4 * parameters, how="4 B x P", where=device)
        return
    if engine.zero_stage >= 1:
        default = _OUR_REDUCE_BUCKET if job.entry == TRAIN_ENTRY else _REDUCE_BUCKET
        bucket = min(parameters, _elements(zero, "reduce_bucket_size", default))
        # With overlap_comm (its default in stage 3) one is filled while the other is reduced.
        buckets = 2 if zero.get("overlap_comm", engine.zero_stage == 3) else 1
        how = f"{buckets} x {width} B x min(P, reduce_bucket_size)"
        yield Part(name="reduce buckets", size_bytes=buckets * width * bucket, how=how, where=device)
    if engine.zero_stage == 3:
        ahead = _elements(zero, "stage3_prefetch_bucket_size", _PREFETCH_BUCKET)
        gathered = min(parameters, 2 * largest_layer + ahead)
        how = f"{width} B x min(P, a layer and its gradient + stage3_prefetch_bucket_size)"
        yield Part(name="gathered weights", size_bytes=width * gathered, how=how, where=device)


def _zero(engine: Engine) -> Mapping[str, Any]:
    """`[engine.deepspeed.zero_optimization]`."""
    found = engine.deepspeed.get("zero_optimization", {})
    return found if engine.kind == "deepspeed" and isinstance(found, Mapping) else {}


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    table = zero.get(key)
    return isinstance(table, Mapping) and table.get("device", "none") not in ("none", None)


def _elements(zero: Mapping[str, Any], key: str, default: int) -> int:
    """A bucket's size: DeepSpeed takes 5e8 as well as 500000000; what is none ("auto") stays the default."""
    value = zero.get(key, default)
    return int(value) if isinstance(value, (int, float)) else default
