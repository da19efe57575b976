"""DeepSpeed: ZeRO 0, 1, 2 and 3 in fp32 and bf16, with torch's AdamW.

bf16 means what DeepSpeed means by it: parameters and gradients in bf16, fp32 masters and moments (partitioned from
ZeRO 1 on). Gradients are accumulated in bf16 unless the job says
`[engine.deepspeed] data_types = { grad_accum_dtype = "fp32" }`, which DeepSpeed knows from ZeRO 1 on.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState
from cfe_hpc.config.job import Engine as EngineSpec
from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.train.config import Params
from cfe_hpc.train.model import Transformer
from cfe_hpc.train.optim import make_adamw

__all__ = ["DeepSpeedEngine", "deepspeed_config"]

OURS = {
    "train_batch_size": "params.global_batch",
    "train_micro_batch_size_per_gpu": "params.micro_batch",
    "gradient_accumulation_steps": "params.global_batch and params.micro_batch",
    "gradient_clipping": "params.grad_clip",
    "optimizer": "params.lr, params.beta1, params.beta2 and params.weight_decay",
    "scheduler": "params.warmup_steps and params.min_lr_ratio",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
}
"""DeepSpeed's keys that the job's own keys decide, and which."""

NEVER_PRINT = 1_000_000_000
"""steps_per_print: 0 would divide by zero in the first step."""


def deepspeed_config(spec: EngineSpec, params: Params, *, accumulate: int) -> dict[str, Any]:
    """The configuration for deepspeed.initialize: ours, with `[engine.deepspeed]` merged over it.

    Raises:
        ConfigError: `[engine.deepspeed]` sets what the job's own keys decide.
    """
    problems = [
        Problem(file="job", key=f"engine.deepspeed.{key}", what="is decided elsewhere", remedy=f"set {instead}")
        for key, instead in OURS.items()
        if _holds(spec.deepspeed, key.split("."))
    ]
    if problems:
        raise ConfigError(problems)
    plain_fp32 = spec.zero_stage == 0 and spec.precision == "fp32"
    config = {
        "train_micro_batch_size_per_gpu": params.micro_batch,
        "gradient_accumulation_steps": accumulate,
        # Without ZeRO and in fp32, DeepSpeed clips but does not tell the norm: the engine clips itself there.
        "gradient_clipping": 0.0 if plain_fp32 else params.grad_clip,
        "bf16": {"enabled": spec.precision == "bf16"},
        # An initial bucket as large as the default of 5e8 elements would be allocated in full, whatever the model.
        "zero_optimization": {"stage": spec.zero_stage, "reduce_bucket_size": 50_000_000},
        "steps_per_print": NEVER_PRINT,
        "zero_allow_untested_optimizer": True,
    }
    return _merged(config, spec.deepspeed)


class DeepSpeedEngine:
    """See `TrainingEngine`."""

    def __init__(
        self, spec: EngineSpec, params: Params, model: Transformer, *, accumulate: int, world_size: int
    ) -> None:
        deepspeed = _import_quietly()
        with redirect_stdout(io.StringIO()):  # memory figures of each parameter group
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=make_adamw(model, params),
                config=deepspeed_config(spec, params, accumulate=accumulate),
                dist_init_required=False,
            )
        self._clip_here = spec.zero_stage == 0 and spec.precision == "fp32"
        self._grad_clip = params.grad_clip

    def forward_backward(self, tokens_BT: Tensor, targets_BT: Tensor, *, is_last: bool) -> Tensor:
        loss: Tensor = self._engine(tokens_BT, targets_BT).mean()
        self._engine.backward(loss)
        if not is_last:
            self._engine.step()  # counts the micro batch; updates nothing before the last one
        return loss.detach()

    def step(self, rate: float) -> Tensor | float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self._clip_here:
            limit = self._grad_clip or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit)
        self._engine.step()
        return self._engine.get_global_grad_norm() if norm is None else norm

    @torch.no_grad()
    def evaluate(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        self._engine.eval()
        loss_B: Tensor = self._engine(tokens_BT, targets_BT)
        self._engine.train()
        return loss_B

    def tracked(self) -> dict[str, Any]:
        return {"engine": DeepSpeedState(self._engine)}


def _import_quietly() -> Any:
    """The deepspeed package, with what it would say or build to no use turned off."""
    # DeepSpeed calls torch's collectives by names that newer torch deprecates, at every step.
    message = r"`?torch\.distributed\.\w+`? is deprecated"
    warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    import deepspeed

    # Compiled with the machine's C++ compiler in the first run, half a minute, and used by inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _holds(table: Mapping[str, Any], path: list[str]) -> bool:
    head, *rest = path
    if head not in table:
        return False
    return not rest or (isinstance(table[head], Mapping) and _holds(table[head], rest))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
