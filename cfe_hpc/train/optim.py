"""AdamW's parameter groups, and the learning rate as a function of the step and nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from cfe_hpc.train.config import Params

__all__ = ["make_adamw", "parameter_groups", "rate_at"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay, vectors (gains, biases) without; a group with nothing in it is left out."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_adamw(model: nn.Module, params: Params) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`. Its rate is 0 until someone sets `rate_at(step)`.

    Zero matters: for bf16 without ZeRO, DeepSpeed makes a step with no gradient to allocate the moments, which
    would decay the weights once.
    """
    groups = parameter_groups(model, params.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(params.beta1, params.beta2), eps=params.eps)


def rate_at(step: int, params: Params) -> float:
    """The learning rate of step `step`, counted from 0: linear warm-up to lr, then half a cosine down to
    min_lr_ratio * lr at the last step."""
    if step < params.warmup_steps:
        return params.lr * (step + 1) / params.warmup_steps
    span = max(1, params.steps - 1 - params.warmup_steps)
    share = min(1.0, (step - params.warmup_steps) / span)
    floor = params.min_lr_ratio
    return params.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share)))
