"""One of three ranks that save and load FSDP2, DDP and plain models in every combination; prints what it found.

Started by test_checkpoint_fsdp.py. Worlds of one and two ranks are groups of the same processes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.state.torch_group import TorchGroup
from cfe_hpc.checkpoints.store import save
from cfe_hpc.checkpoints.tracked import capture, restore
from cfe_hpc.errors import CheckpointError
from cfe_hpc.ranks.weights import weights_sha256

RANKS = 3


class Net(torch.nn.Module):
    """Rows that do not divide by two or three, fewer rows than ranks, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 5)
        self.up = torch.nn.Linear(5, 1031)
        self.down = torch.nn.Linear(1031, 5)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.head = torch.nn.Linear(5, 4)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.head(self.gain * self.down(torch.tanh(self.up(self.embed(tokens)))))


class Training:
    def __init__(self, kind: str, mesh: DeviceMesh | None, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = Net()
        self.model: torch.nn.Module = self.net
        if kind in ("fsdp", "hsdp", "mixed"):
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if kind == "mixed" else MixedPrecisionPolicy()
            for module in (self.net.up, self.net.down, self.net):
                fully_shard(module, mesh=mesh, mp_policy=precision)
        elif kind == "ddp":
            self.model = DistributedDataParallel(self.net, process_group=mesh.get_group())
        matrices = [each for each in self.model.parameters() if each.dim() > 1]
        vectors = [each for each in self.model.parameters() if each.dim() < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.01)

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self, number: int) -> float:
        tokens = torch.arange(8) * (number + 1) % 4
        loss = torch.nn.functional.cross_entropy(self.model(tokens).float(), tokens.flip(0))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def digest(self) -> str:
        """Of all weights, moments and counters, each put together. Collective."""
        whole = hashlib.sha256()
        for name, parameter in sorted(self.net.named_parameters()):
            for key, value in [("", parameter), *sorted(self.optimizer.state[parameter].items())]:
                value = value.detach()
                full = value.full_tensor() if isinstance(value, DTensor) else value
                whole.update(f"{name}/{key}".encode() + full.numpy().tobytes())
        return whole.hexdigest()


class World:
    """The first ranks of all, as a world of their own. Making one is collective over all."""

    def __init__(self, size: int) -> None:
        self.size, self.inside = size, dist.get_rank() < size
        self.mesh = DeviceMesh("cpu", list(range(size)), mesh_dim_names=("shard",))
        self.replicas = DeviceMesh("cpu", [[rank] for rank in range(size)], mesh_dim_names=("replicate", "shard"))
        group = dist.new_group(list(range(size)))
        self.group = TorchGroup(group) if self.inside else None

    def training(self, kind: str, seed: int) -> Training:
        return Training(kind, self.replicas if kind == "hsdp" else self.mesh, seed)


def put(root: Path, world: World, training: Training) -> None:
    content = capture(training.objects(), group=world.group)
    save(root, content, step=2, attempt=0, run_id="r", group=world.group)


def take(root: Path, world: World, training: Training) -> None:
    restore(Opened.at(root / "step-000000002"), training.objects(), group=world.group)


LAYOUTS = [("plain", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("hsdp", 3), ("mixed", 3)]


def matrix(folder: Path, worlds: dict[int, World], found: dict[str, Any]) -> None:
    for kind, size in LAYOUTS:
        world, label = worlds[size], f"{kind}{size}"
        if world.inside:
            training = world.training(kind, seed=1)
            training.step(0), training.step(1)
            put(folder / label, world, training)
            sha = weights_sha256({"model": training.model}, world.group)
            found[label] = {"digest": training.digest(), "sha": sha, "next": training.step(2)}
        dist.barrier()
    for saved in [f"{kind}{size}" for kind, size in LAYOUTS]:
        for kind, size in LAYOUTS:
            if worlds[size].inside:
                training = worlds[size].training(kind, seed=2)
                if (kind, size) == ("fsdp", 2):
                    training.step(5)  # its optimizer has state already
                take(folder / saved, worlds[size], training)
                sha = weights_sha256({"model": training.model}, worlds[size].group)
                found[f"{saved} {kind}{size}"] = {"digest": training.digest(), "sha": sha, "next": training.step(2)}
    dist.barrier()


def refusals(world: World, found: dict[str, Any]) -> None:
    class Columns(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), world.mesh, [Shard(1)]))

    found["columns"] = told(lambda: capture({"model": Columns()}, group=world.group))


def told(act: Callable[[], object]) -> str:
    try:
        act()
    except CheckpointError as error:
        return str(error)
    return ""


def after_evaluation(folder: Path, world: World, found: dict[str, Any]) -> None:
    """An evaluation leaves the root's parameters whole, and in low precision."""
    training = world.training("mixed", seed=1)
    training.step(0)
    before = weights_sha256({"model": training.model}, world.group)
    with torch.no_grad():
        training.model(torch.arange(4))
    found["evaluated"] = [before, weights_sha256({"model": training.model}, world.group)]
    with torch.no_grad():
        training.model(torch.arange(4))
    content = capture(training.objects(), group=world.group)
    found["evaluated dtypes"] = sorted({piece.dtype for piece in content.pieces if "model/" in piece.name})
    found["evaluated names"] = [name for group in content.state["optimizer"]["parameters"] for name, *_ in group]
    found["steady"] = sorted({piece.name for piece in content.pieces if piece.steady})
    found["unchanged"] = [content.unchanged()]
    training.step(1)
    found["unchanged"].append(content.unchanged())


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    worlds = {size: World(size) for size in range(1, RANKS + 1)}
    found: dict[str, Any] = {}
    matrix(folder, worlds, found)
    refusals(worlds[RANKS], found)
    after_evaluation(folder, worlds[RANKS], found)
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
