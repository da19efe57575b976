"""One rank of a DDP training that saves at a step or resumes from there; started by test_checkpoint_ddp.py."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_groups import SocketGroup

from cfe_hpc.checkpoints.state import tensors
from cfe_hpc.checkpoints.store import newest, save
from cfe_hpc.checkpoints.tracked import capture, restore

SAVED, TOTAL = 4, 8


class Position:
    def __init__(self, rank: int) -> None:
        self.random = random.Random(rank)

    def state_dict(self) -> dict:
        return {"state": self.random.getstate()}

    def load_state_dict(self, state: dict) -> None:
        self.random.setstate(state["state"])


class Counted:
    """Bytes that went into checksums of tensors."""

    def __init__(self) -> None:
        self.size_bytes, self._crc32c = 0, tensors.crc32c
        tensors.crc32c = self

    def __call__(self, content: memoryview) -> int:
        self.size_bytes += len(content)
        return self._crc32c(content)


def report(content: object, summed_bytes: int, unchanged: list[bool]) -> dict:
    return {
        "summed_bytes": summed_bytes,
        "written_bytes": sum(piece.data.nbytes for piece in content.pieces),
        "own": sorted(piece.name for piece in content.own),
        "shared": sorted({piece.name for piece in content.pieces}),
        "steady": sorted({piece.name for piece in [*content.pieces, *content.own] if piece.steady}),
        "unchanged": unchanged,
    }


def own_when_apart(objects: dict, moment: torch.Tensor, group: SocketGroup) -> list[str]:
    """What each rank saves for itself when one has another number at the end of a moment."""
    last = moment[-1].clone()
    moment[-1] = group.rank
    content = capture(objects, group=group)
    moment[-1] = last
    return sorted(piece.name for piece in content.own if piece.name.startswith("optimizer/"))


def main(mode: str, folder: Path, rank: int, size: int, links: list[int]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(100 * (mode == "resume") + rank)
    group = SocketGroup(rank, size, [socket.socket(fileno=fd) for fd in links])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{mode}", rank=rank, world_size=size)
    net = torch.nn.Sequential(
        torch.nn.Linear(16, 4096), torch.nn.BatchNorm1d(4096), torch.nn.Dropout(0.2), torch.nn.Linear(4096, 16)
    )
    net.register_parameter("mine", torch.nn.Parameter(torch.full((3,), float(rank)), requires_grad=False))
    net._ddp_params_and_buffers_to_ignore = ["mine"]
    model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": Position(rank)}
    first, told, content = 0, {}, None
    if mode == "resume":
        opened = newest(folder / "checkpoints", run_id="r", attempt=1, group=group)
        assert opened is not None
        restore(opened, objects, group=group)
        first = opened.step
    for step in range(first, TOTAL):
        if mode == "whole" and step == SAVED:
            apart = own_when_apart(objects, optimizer.state[net[0].weight]["exp_avg"].view(-1), group)
            counted = Counted()
            content = capture(objects, group=group)
            told = {"apart": apart, **report(content, counted.size_bytes, [content.unchanged()])}
            save(folder / "checkpoints", content, step=step, attempt=0, run_id="r", group=group)
        x = torch.randn(8, 16) + objects["data"].random.random()
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == SAVED and content is not None:
            told["unchanged"].append(content.unchanged())
        optimizer.step()
        if step == SAVED and content is not None:
            told["unchanged"].append(content.unchanged())
        schedule.step()
    parts = [*net.state_dict().values(), *(value for each in optimizer.state.values() for value in each.values())]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    print(first, digest, loss.item().hex(), schedule.get_last_lr()[0].hex(), flush=True)
    print(json.dumps(told), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]), links=[int(fd) for fd in sys.argv[5:]])
