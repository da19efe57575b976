"""The training that every way runs: two ranks, one model, and a line for each step that rank 0 has done."""

from __future__ import annotations

import json
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which making an optimizer imports, for over a second: it belongs to the imports
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

LAYERS, WIDTH, ROWS = 5, 1024, 64
"""5.2 million parameters: with Adam's moments 63 MB of state."""


def process_began_s() -> float:
    """Epoch seconds at which this process was started, before any import."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as stat, open("/proc/uptime") as uptime:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        return time.time() - (float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))


IMPORTED_S = time.time()
"""torch is imported."""


def set_rank_variables() -> None:
    """What srun tells a task, in torch.distributed's words; a port of the job's own, as scripts usually choose it."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(20000 + (int(os.environ["SLURM_JOB_ID"]) * 97 + _restarts()) % 10000)


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


class Workload:
    """Model, optimizer and a step; what to save and how, for ways that save by themselves."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()) for _ in range(LAYERS)]
        self.model = torch.nn.Sequential(*layers)
        self.parallel = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self._first = True

    def step(self, number: int) -> None:
        """Train step `number`: what it computes follows from the number and the state alone."""
        began_s = time.time()
        generator = torch.Generator().manual_seed(number * dist.get_world_size() + self.rank)
        rows = torch.randn(ROWS, WIDTH, generator=generator)
        self.optimizer.zero_grad(set_to_none=True)
        (self.parallel(rows) - rows).square().mean().backward()
        self.optimizer.step()
        if self.rank == 0:
            line: dict[str, Any] = {"step": number, "began_s": began_s, "ended_s": time.time()}
            if self._first:
                line |= {"process_s": process_began_s(), "restarts": _restarts()}
            with open("steps.ndjson", "a", encoding="utf-8") as steps:
                steps.write(json.dumps(line) + "\n")
        self._first = False

    def save(self, path: Path, done: int, *, sync: bool = False) -> None:
        """What scripts usually do: rank 0 writes aside, and moves it over; the others go on."""
        if self.rank != 0:
            return
        state = {"done": done, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        aside = path.with_suffix(".new")
        with open(aside, "wb") as out:
            torch.save(state, out)
            if sync:
                out.flush()
                os.fsync(out.fileno())
        os.replace(aside, path)

    def load(self, path: Path) -> int:
        """Steps done at the save, 0 without one; every rank reads it."""
        if not path.exists():
            return 0
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])

    def finish(self) -> None:
        """Leave word that the last step is done, and what the weights came to."""
        if self.rank == 0:
            weights = b"".join(parameter.detach().numpy().tobytes() for parameter in self.model.parameters())
            Path("finished").write_text(sha256(weights).hexdigest())
        dist.barrier()
        dist.destroy_process_group()
