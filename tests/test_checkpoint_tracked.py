"""Tracked objects into checkpoints and back: continued training is the undisturbed one, bit for bit."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_groups import ThreadGroup, all_good, run_ranks

from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.rng import capture_rng, restore_rng
from cfe_hpc.checkpoints.store import newest, save
from cfe_hpc.checkpoints.tracked import capture, is_trackable, restore
from cfe_hpc.errors import CheckpointError, CheckpointMismatch


class Sampler:
    """An object of a rank's own."""

    def __init__(self, rank: int) -> None:
        self.position, self.weights = rank * 100, torch.full((3,), float(rank))

    def state_dict(self) -> dict:
        return {"position": self.position, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.position, self.weights = state["position"], state["weights"]


class Training:
    def __init__(self, rank: int = 0, *, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = 33) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 8)
        ).to(dtype)
        decay, plain = [self.model[0].weight, self.model[3].weight], [self.model[0].bias, self.model[3].bias]
        self.optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain}], lr=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.sampler = Sampler(rank)

    def objects(self) -> dict:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "sampler": self.sampler,
        }

    def step(self) -> float:
        noise = random.random() + float(np.random.rand())
        batch = torch.randn(16, 8, dtype=self.model[0].weight.dtype) + noise
        loss = (self.model(batch) - batch).float().square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.sampler.position += 1
        return loss.item()


def bits(module: torch.nn.Module) -> list[bytes]:
    return [value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in module.state_dict().values()]


def put(root: Path, group, objects: dict, step: int = 4, **facts) -> None:
    save(root, capture(objects, group=group, facts=facts), step=step, attempt=0, run_id="run-1", group=group)


def take(root: Path, group, objects: dict, **facts) -> int:
    opened = newest(root, run_id="run-1", attempt=1, group=group)
    assert opened is not None
    restore(opened, objects, group=group, facts=facts)
    return opened.step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_as_if_undisturbed(tmp_path: Path, dtype: torch.dtype) -> None:
    undisturbed = Training(seed=1, dtype=dtype)
    for _ in range(4):
        undisturbed.step()
    put(tmp_path, SoloGroup(), undisturbed.objects())
    losses = [undisturbed.step() for _ in range(4)]

    resumed = Training(seed=2, dtype=dtype)
    random.seed(5)
    assert take(tmp_path, SoloGroup(), resumed.objects()) == 4
    assert [resumed.step() for _ in range(4)] == losses
    assert bits(resumed.model) == bits(undisturbed.model)
    assert resumed.sampler.position == undisturbed.sampler.position
    assert resumed.schedule.state_dict() == undisturbed.schedule.state_dict()
