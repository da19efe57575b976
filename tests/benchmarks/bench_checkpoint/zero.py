"""DeepSpeed: its own save_checkpoint, its decoupled writer, and our saves of its engines."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from pathlib import Path
from typing import Any

import torch

from bench_checkpoint import files
from bench_checkpoint.ours import Beside, Save
from bench_checkpoint.state import shapes
from bench_checkpoint.ways import Place, Way
from cfe_hpc.files import fsync_file

NEVER_PRINT = 1_000_000_000


class Layers(torch.nn.Module):
    """The parameters of `state.shapes`, each used once, by as little arithmetic as will do."""

    def __init__(self, state_bytes: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        wanted = shapes(state_bytes)
        for name, shape in wanted.items():
            if len(shape) == 2:
                bias = name.removesuffix("weight") + "bias" in wanted
                self.layers.append(torch.nn.Linear(shape[1], shape[0], bias=bias))
            elif name.endswith("weight"):
                self.layers.append(torch.nn.LayerNorm(shape))

    def forward(self, ones: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=ones.dtype)
        for layer in self.layers:
            width = layer.in_features if isinstance(layer, torch.nn.Linear) else layer.normalized_shape[0]
            total = total + layer(ones[:, :width]).float().mean()
        return total


class Zero:
    """An engine of as many parameters, in bf16 with fp32 masters, after its first step.

    Attributes:
        size_bytes: of this rank's masters and moments.
    """

    def __init__(self, state_bytes: int, stage: int, place: Place, *, decoupled: bool) -> None:
        self.stage, self.place = stage, place
        os.environ.update(CROSS_RANK="0", CROSS_SIZE="1", LOCAL_RANK=str(place.rank))
        os.environ.update(LOCAL_SIZE=str(place.size), RANK=str(place.rank), WORLD_SIZE=str(place.size))
        # Its own files do not load without: DeepSpeed's issue 8500.
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        import deepspeed

        model = Layers(state_bytes)
        self._width = max(layer.in_features for layer in model.layers if isinstance(layer, torch.nn.Linear))
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000},
            "steps_per_print": NEVER_PRINT,
            "zero_allow_untested_optimizer": True,
        }
        if decoupled:
            writer = {"type": "python", "decoupled": True, "data_parallel": "replica"}
            config["checkpoint"] = {"writer": writer}
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4), config=config
            )
        self.step()
        from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState

        pieces, _ = DeepSpeedState(self.engine).checkpoint_state()
        self.tensors = [torch.frombuffer(piece.data, dtype=torch.uint8) for piece in pieces if piece.data.nbytes]
        self.size_bytes = sum(tensor.nbytes for tensor in self.tensors)

    def step(self) -> float:
        """One step of training; its seconds."""
        self.place.group.barrier()
        started = time.monotonic()
        loss = self.engine(torch.ones(1, self._width, dtype=torch.bfloat16))
        self.engine.backward(loss)
        self.engine.step()
        return time.monotonic() - started

    def fill(self) -> None:
        """Nothing: what training made stays."""

    clear = check = fill


class ZeroSave(Way):
    """engine.save_checkpoint, then fsync of this rank's share of its files."""

    state: Any

    def save(self, folder: Path) -> None:
        self.state.engine.save_checkpoint(str(folder), tag="step")
        self.returned()
        self.place.group.barrier()
        for path in sorted(files.files_of(folder))[self.place.rank :: self.place.size]:
            fsync_file(path)
        self.place.group.barrier()

    def load(self, folder: Path) -> None:
        path, _ = self.state.engine.load_checkpoint(str(folder), tag="step")
        assert path is not None


class OurZero(Save):
    """store.save of the engine through our adapter."""

    def _objects(self) -> dict[str, Any]:
        return {"engine": self.state.engine}


class OurZeroBeside(Beside, OurZero):
    """Background of the engine through our adapter."""


def save_decoupled(zero: Zero, folder: Path) -> dict[str, float]:
    """One save of the decoupled writer, with the steps before and after it: the next one waits for the writer."""
    plain_s = zero.step()
    os.sync()
    zero.place.group.barrier()
    began = time.monotonic()
    zero.engine.save_checkpoint(str(folder), tag="step")
    call_s = time.monotonic() - began
    next_s = zero.step()
    for path in sorted(files.files_of(folder))[zero.place.rank :: zero.place.size]:
        fsync_file(path)
    zero.place.group.barrier()
    waited_s = max(0.0, next_s - plain_s)
    return {
        "call_s": call_s,
        "waited_s": waited_s,
        "blocked_s": call_s + waited_s,
        "lost_s": call_s + waited_s,
        "durable_s": time.monotonic() - began,
        "step_before_s": plain_s,
        "step_during_s": next_s,
    }


ZERO_WAYS: dict[str, Any] = {
    "deepspeed": ZeroSave,
    "cfe-deepspeed": OurZero,
    "cfe-deepspeed-async": OurZeroBeside,
    "cfe-deepspeed-overlap": functools.partial(OurZeroBeside, overlap=True),
}
