"""Checks of `[engine]`: do ZeRO stage, offloading, optimizer, precision and accelerator go together?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts

__all__ = [
    "bf16_hardware",
    "deepspeed_trainer",
    "engine_unused",
    "grad_accum_dtype",
    "offload_cpu",
    "offload_path",
    "offload_stage",
    "optimizer",
    "unsaved_state",
    "zero_alone",
]

_TRAINERS = {
    "optimizer": "params.lr, params.beta1, params.beta2 and params.weight_decay",
    "scheduler": "params.warmup_steps and params.min_lr_ratio",
    "gradient_clipping": "params.grad_clip",
}
"""DeepSpeed's keys that the [params] of the shipped trainer decide, and which."""

# Kepler to Turing, as far as a name tells (an RTX 6000 may be newer): bf16 came with compute capability 8.0.
_NO_BF16 = r"(?i)(?<![a-z0-9])(?:k80|p40|p100|v100s?|t4|gtx\w*|rtx_?(?:20[678]0\w*|8000))(?![a-z0-9])"


def _uses_deepspeed(facts: Facts) -> bool:
    """Whether `[engine]` says DeepSpeed, and somebody reads it: the shipped trainer, or a job that sets its keys."""
    engine = facts.job.engine
    return engine.kind == "deepspeed" and (facts.params is not None or bool(engine.deepspeed))


def _zero(facts: Facts) -> Mapping[str, Any]:
    return _table(facts.job.engine.deepspeed.get("zero_optimization")) if _uses_deepspeed(facts) else {}


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _offload(facts: Facts, what: str) -> Mapping[str, Any] | None:
    """`offload_optimizer` or `offload_param` of a job, where it offloads; None otherwise."""
    table = _table(_zero(facts).get(what))
    return table if table.get("device", "none") in ("cpu", "nvme") else None


def _key(*parts: str) -> str:
    return ".".join(("job.engine.deepspeed", *parts))


def offload_stage(facts: Facts) -> Iterator[Problem]:
    stage = facts.job.engine.zero_stage
    for what, fewest in (("offload_param", 3), ("offload_optimizer", 1)):
        table = _offload(facts, what)
        if table is None:
            continue
        # https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training: nvme is stage 3's alone.
        needed = 3 if table["device"] == "nvme" or table.get("ratio", 1.0) < 1.0 else fewest
        if stage < needed:
            problem = f"needs ZeRO stage {needed}{' or above' if needed < 3 else ''}, and the job has stage {stage}"
            remedy = f"set engine.zero_stage = {needed}, or take it out"
            yield facts.problem(_key("zero_optimization", what), problem, remedy, table["device"])


def offload_path(facts: Facts) -> Iterator[Problem]:
    for what in ("offload_param", "offload_optimizer"):
        table = _offload(facts, what)
        if table is not None and table["device"] == "nvme" and not table.get("nvme_path"):
            remedy = "set nvme_path to a fast folder of each node"
            yield facts.problem(_key("zero_optimization", what, "nvme_path"), "nvme is offloaded to no folder", remedy)


def optimizer(facts: Facts) -> Iterator[Problem]:
    table = _table(facts.job.engine.deepspeed.get("optimizer")) if _uses_deepspeed(facts) else {}
    name = str(table.get("type", ""))
    if "max_grad_norm" in _table(table.get("params")):
        what, remedy = "DeepSpeed refuses it here", "set engine.deepspeed.gradient_clipping instead"
        yield facts.problem(_key("optimizer", "params", "max_grad_norm"), what, remedy)
    if name.lower() == "lamb" and facts.params is None:  # FusedLamb, a CUDA kernel, wherever the state lies
        offloaded = _offload(facts, "offload_optimizer") is not None
        if offloaded or facts.plan.accelerator != "cuda":
            where = "its state is offloaded" if offloaded else f"ranks train on {facts.plan.accelerator}"
            what = f"DeepSpeed computes it on CUDA devices alone, and {where}"
            yield facts.problem(_key("optimizer", "type"), what, "use Adam, AdamW, Lion or Adagrad", name)


def offload_cpu(facts: Facts) -> Iterator[Problem]:
    if facts.plan.accelerator != "cpu":
        return
    for what in ("offload_param", "offload_optimizer"):
        if _offload(facts, what) is not None:
            problem = "ranks train on the CPU: what is offloaded stays in the same memory, and is copied for nothing"
            yield facts.problem(_key("zero_optimization", what), problem, "take it out")


def unsaved_state(facts: Facts) -> Iterator[Problem]:
    # What cfe_hpc.checkpoints.state.deepspeed refuses when the engine is tracked, after minutes in an allocation.
    if facts.params is None:
        return
    zero = _zero(facts)
    for what in ("offload_param", "offload_optimizer"):
        if _offload(facts, what) is not None:
            yield _unsaved(facts, what)
    if zero.get("round_robin_gradients"):
        yield _unsaved(facts, "round_robin_gradients")
    if zero.get("zero_hpz_partition_size", 1) != 1:
        yield _unsaved(facts, "zero_hpz_partition_size")


def _unsaved(facts: Facts, name: str) -> Problem:
    what = "cfe_hpc cannot lay out in checkpoints what DeepSpeed keeps then"
    return facts.problem(_key("zero_optimization", name), what, "take it out")


def deepspeed_trainer(facts: Facts) -> Iterator[Problem]:
    if facts.params is None or facts.job.engine.kind != "deepspeed":
        return
    for name, instead in _TRAINERS.items():
        if name in facts.job.engine.deepspeed:
            yield facts.problem(_key(name), "is decided by [params]", f"take it out and set {instead}")


def grad_accum_dtype(facts: Facts) -> Iterator[Problem]:
    if not _uses_deepspeed(facts):
        return
    engine = facts.job.engine
    dtype = _table(engine.deepspeed.get("data_types")).get("grad_accum_dtype")
    if engine.zero_stage == 0 and dtype not in (None, engine.precision):
        what = f"DeepSpeed accumulates {engine.precision} gradients in {engine.precision} alone without ZeRO"
        remedy = "set engine.zero_stage = 1 or above, or take it out"
        yield facts.problem(_key("data_types", "grad_accum_dtype"), what, remedy, dtype)


def bf16_hardware(facts: Facts) -> Iterator[Problem]:
    hardware = facts.hardware
    if facts.plan.accelerator != "cuda" or facts.job.engine.precision != "bf16" or facts.params is None:
        return
    named = " ".join((facts.plan.gres or "", facts.plan.constraint or "", facts.partition.hardware, *hardware.features))
    old = re.search(_NO_BF16, named)
    if old is not None:
        what = f"{old[0]} devices do not compute in bf16"
        remedy = 'set precision = "fp32", or choose newer devices'
        yield facts.problem("job.engine.precision", what, remedy, "bf16")


def engine_unused(facts: Facts) -> Iterator[Problem]:
    engine, origins = facts.job.engine, facts.loaded.origins
    if engine.kind == "torch":
        if engine.deepspeed:
            what, remedy = "is DeepSpeed's, and the engine is torch", 'set kind = "deepspeed", or take it out'
            first = next(iter(engine.deepspeed))
            yield facts.problem(_key(first), what, remedy)
        if origins.get("job.engine.zero_stage", "default") != "default" and engine.zero_stage:
            what, remedy = "torch's DDP partitions nothing", 'set kind = "deepspeed", or take it out'
            yield facts.problem("job.engine.zero_stage", what, remedy, engine.zero_stage)


def zero_alone(facts: Facts) -> Iterator[Problem]:
    stage = facts.job.engine.zero_stage
    stated = facts.loaded.origins.get("job.engine.zero_stage", "default") != "default"
    if _uses_deepspeed(facts) and stated and stage and facts.plan.world_size == 1:
        what = "there is nobody to share with: one rank holds all of it"
        yield facts.problem("job.engine.zero_stage", what, "ask for more devices, or set zero_stage = 0", stage)
