"""Plain torch: one process, or DistributedDataParallel over several.

bf16 means autocast: weights, gradients and moments stay fp32 (so there are no separate masters to keep), matrix
products and attention run in bf16. Autocast needs no loss scale, since bf16 has the range of fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cfe_hpc.config.job import Engine as EngineSpec
from cfe_hpc.train.config import Params
from cfe_hpc.train.model import Transformer
from cfe_hpc.train.optim import make_adamw

__all__ = ["TorchEngine"]


class TorchEngine:
    """See `TrainingEngine`. Alone (world_size 1) it needs no process group."""

    def __init__(
        self,
        spec: EngineSpec,
        params: Params,
        model: Transformer,
        *,
        device: torch.device,
        accumulate: int,
        world_size: int,
    ) -> None:
        self._model = model.to(device)
        self._optimizer = make_adamw(self._model, params)
        self._wrapped = DistributedDataParallel(self._model) if world_size > 1 else None
        self._grad_clip = params.grad_clip
        self._accumulate = accumulate
        self._device = device
        self._bf16 = spec.precision == "bf16"
        if self._wrapped is not None:
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """One pass whose gradients are thrown away. Collective.

        DDP puts gradients into buckets anew after a process's first backward, which changes the order that three or
        more ranks add them up in: a run that resumes must add as the one that went on.
        """
        tokens_BT = torch.zeros(1, 2, dtype=torch.long, device=self._device)
        self.forward_backward(tokens_BT, tokens_BT, is_last=True)
        self._optimizer.zero_grad(set_to_none=True)

    def forward_backward(self, tokens_BT: Tensor, targets_BT: Tensor, *, is_last: bool) -> Tensor:
        quiet = nullcontext() if is_last or self._wrapped is None else self._wrapped.no_sync()
        with quiet:
            with self._precision():
                loss: Tensor = (self._wrapped or self._model)(tokens_BT, targets_BT).mean()
            (loss / self._accumulate).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, rate: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        limit = self._grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def evaluate(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with self._precision():
            loss_B: Tensor = self._model(tokens_BT, targets_BT)
        return loss_B

    def tracked(self) -> dict[str, Any]:
        return {"model": self._wrapped or self._model, "optimizer": self._optimizer}

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else nullcontext()
