"""What the training loop needs of an engine: gradients of micro batches, and one optimizer step."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, device

from cfe_hpc.config.job import Engine as EngineSpec
from cfe_hpc.train.config import Params
from cfe_hpc.train.model import Transformer

__all__ = ["TrainingEngine", "make_engine"]


class TrainingEngine(Protocol):
    """One rank's share of a data-parallel optimizer. Every method is collective: all ranks call it alike."""

    def forward_backward(self, tokens_BT: Tensor, targets_BT: Tensor, *, is_last: bool) -> Tensor:
        """Add the gradient of one micro batch; gradients of a step's micro batches are averaged.

        Args:
            tokens_BT: token ids, int64, on the run's device.
            targets_BT: the ids one position on.
            is_last: the step's last micro batch: the gradients are reduced over ranks.

        Returns:
            This rank's mean loss in nats: a detached 0-d tensor on the device.
        """

    def step(self, rate: float) -> Tensor | float:
        """Clip, update the weights with learning rate `rate` and drop the gradients.

        Returns:
            The norm of the gradient over all ranks and parameters, before clipping.
        """

    def evaluate(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss of each sequence of this rank's micro batch, (B,), without gradients, on the device."""

    def tracked(self) -> dict[str, Any]:
        """Name to object, for `run.track`: everything that the next attempt needs to go on with the same bits."""


def make_engine(
    spec: EngineSpec, params: Params, model: Transformer, *, device: device, accumulate: int, world_size: int
) -> TrainingEngine:
    """The engine that the job names. Collective; torch.distributed must be initialised when world_size > 1.

    Args:
        accumulate: micro batches of one rank in one step.

    Raises:
        ConfigError: `[engine.deepspeed]` holds what the training loop decides itself, or what DeepSpeed refuses.
    """
    if spec.kind == "torch":
        from cfe_hpc.train.engine_torch import TorchEngine

        return TorchEngine(spec, params, model, device=device, accumulate=accumulate, world_size=world_size)
    from cfe_hpc.train.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(spec, params, model, accumulate=accumulate, world_size=world_size)
