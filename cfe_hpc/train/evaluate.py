"""The loss on the held-out split, and when it is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cfe_hpc.data.loader import EvalBatch
from cfe_hpc.train.config import Params
from cfe_hpc.train.engine import TrainingEngine

__all__ = ["Evaluations", "averaging_over_ranks", "held_out_loss"]


class Evaluations:
    """Which evaluation is due. Tracked by the run: one that a stop cuts short is done again by the next attempt.

    Attributes:
        due: steps done by the weights that are to be evaluated; None when nothing is due. At first 0: the loss
            before training, which says what the others are to be compared with.
        first, last: losses of the first and the newest evaluation, in nats; None before there is one.
    """

    def __init__(self, params: Params) -> None:
        self._every, self._total = params.eval_every, params.steps
        self.due: int | None = 0
        self.first: float | None = None
        self.last: float | None = None

    def step_done(self, done: int) -> bool:
        """Note that `done` steps are done, and tell whether that makes an evaluation due."""
        if done == self._total or (self._every and done % self._every == 0):
            self.due = done
        return self.due is not None

    def finished(self, loss: float) -> None:
        """The evaluation that was due gave `loss`."""
        self.due, self.last = None, loss
        self.first = loss if self.first is None else self.first

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due, "first": self.first, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.due, self.first, self.last = state["due"], state["first"], state["last"]


def held_out_loss(
    engine: TrainingEngine, batches: Iterator[EvalBatch], *, device: torch.device, between: Callable[[], None]
) -> float:
    """Mean loss in nats over the windows of all ranks' batches. Collective; the same number on every rank.

    Args:
        batches: as many on every rank.
        between: called before each batch, on every rank; may end the run.
    """
    total = torch.zeros(2, dtype=torch.float32, device=device)
    for batch in batches:
        between()
        tokens = torch.from_numpy(batch.tokens).to(device)
        weight_B = torch.from_numpy(batch.weights).to(device)
        loss_B = engine.evaluate(tokens[:, :-1], tokens[:, 1:])
        total += torch.stack(((loss_B * weight_B).sum(), weight_B.sum()))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    loss, weight = total.tolist()
    return float(loss / weight)


@contextmanager
def averaging_over_ranks(value: Tensor) -> Iterator[None]:
    """While the body runs, `value` is averaged over all ranks, in place. Collective, as the body may be.

    Beside an optimizer's step it is nearly free; on its own it would make ranks wait for each other once more.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    work = torch.distributed.all_reduce(value, async_op=True)
    yield
    work.wait()
    value /= torch.distributed.get_world_size()
