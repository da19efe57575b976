"""What does not fit together is refused, by name and on all ranks, before anything changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_groups import run_ranks
from test_checkpoint_tracked import Halves, Sampler, Training, bits, put, take, together

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.tracked import restore
from cfe_hpc.errors import CheckpointError, CheckpointMismatch


def test_what_does_not_fit_is_named_in_full_before_anything_changes(tmp_path: Path) -> None:
    put(tmp_path, SoloGroup(), Training(seed=1).objects(), variant="rope", groups=2)
    other = Training(seed=2, width=40)
    other.optimizer = torch.optim.AdamW(other.model.parameters())
    other.model.add_module("4", torch.nn.Linear(2, 2).to(torch.bfloat16))
    objects = {"model": other.model, "optimizer": other.optimizer, "schedule": Sampler(0), "extra": Sampler(0)}
    before = bits(other.model)
    with pytest.raises(CheckpointMismatch) as caught:
        take(tmp_path, SoloGroup(), objects, variant="irope", groups=2)
    text = str(caught.value)
    for words in (
        "extra is tracked, and not in the checkpoint",
        "sampler is in the checkpoint, and not tracked",
        "variant is 'rope' in the checkpoint and 'irope' in the job",
        "model: 0.weight is float32 [33, 8] in the checkpoint and float32 [40, 8] in the job's",
        "model: 4.weight is not in the checkpoint",
        "optimizer: its parameter groups have [2, 2] parameters in the checkpoint and [6] in the job's",
    ):
        assert words in text
    assert "groups is" not in text and "\n" not in text
    assert bits(other.model) == before


def test_an_optimizer_of_another_class_or_order_is_a_mismatch(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    put(tmp_path, SoloGroup(), {"model": net, "optimizer": torch.optim.AdamW(net.parameters())})
    with pytest.raises(CheckpointMismatch) as caught:
        turned = torch.optim.SGD([net[1].weight, net[1].bias, net[0].weight, net[0].bias], lr=0.1)
        take(tmp_path, SoloGroup(), {"model": net, "optimizer": turned})
    text = str(caught.value)
    assert "optimizer: it was saved from AdamW and is SGD" in text
    assert (
        "optimizer: parameter 0 of group 0 is model/0.weight float32 [2, 2] in the checkpoint and "
        "model/1.weight float32 [2, 2] in the job's"
    ) in text


def test_objects_tell_beforehand_what_they_would_refuse(tmp_path: Path) -> None:
    class Picky(Sampler):
        def check_state_dict(self, state: dict) -> list[str]:
            ref = state["weights"]
            assert (ref.dtype, ref.shape) == ("float32", (3,)), "no tensor is read for this"
            return [f"position was {state['position']}, is {self.position}"] * (state["position"] != self.position)

    class PickyHalves(Halves):
        def check_checkpoint_state(self, reader, tree) -> list[str]:
            return [] if reader.describe("w") == ("float32", (len(self.part),)) and "n" in tree else ["w differs"]

    objects = {"data": Picky(1), "engine": PickyHalves(0, 1), "model": torch.nn.Linear(2, 2)}
    put(tmp_path, SoloGroup(), objects)
    take(tmp_path, SoloGroup(), objects)
    (tmp_path / "step-000000004" / "shard-00000.bin").write_bytes(b"")
    opened = Opened.at(tmp_path / "step-000000004")
    others = {"data": Picky(2), "engine": PickyHalves(0, 2), "model": torch.nn.Linear(2, 3)}
    with pytest.raises(CheckpointMismatch) as caught:
        restore(opened, others, group=SoloGroup())
    for words in ("data: position was 100, is 200", "engine: w differs", "model: weight is float32 [2, 2]"):
        assert words in str(caught.value)


def test_another_dtype_is_a_mismatch(tmp_path: Path) -> None:
    put(tmp_path, SoloGroup(), {"model": torch.nn.Linear(2, 2)})
    with pytest.raises(CheckpointMismatch, match=r"weight is float32 \[2, 2\] in the checkpoint and bfloat16 \[2, 2\]"):
        take(tmp_path, SoloGroup(), {"model": torch.nn.Linear(2, 2).bfloat16()})


def test_a_mismatch_on_one_rank_is_every_ranks(tmp_path: Path) -> None:
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    together(lambda rank, group: put(tmp_path, group, {"model": models[rank]}))
    job = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
    errors = run_ranks(2, lambda group: take(tmp_path, group, {"model": job[group.rank]}))
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, CheckpointMismatch) and "rank 1: " in str(error) for error in errors)


def test_a_state_that_one_rank_cannot_store_is_every_ranks_error(tmp_path: Path) -> None:
    class Odd(Sampler):
        def state_dict(self) -> dict:
            return {"fine": 1, "file": Path("x")} if self.position else {"fine": 1}

    errors = run_ranks(2, lambda group: put(tmp_path, group, {"data": Odd(group.rank)}))
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert "rank 1: data/file: a pathlib" in str(errors[0]) and isinstance(errors[0], CheckpointError)


def test_ranks_that_track_different_names_are_told(tmp_path: Path) -> None:
    errors = run_ranks(2, lambda group: put(tmp_path, group, {f"data{group.rank}": Sampler(0)}))
    assert all("ranks track different objects" in str(error) for error in errors)
