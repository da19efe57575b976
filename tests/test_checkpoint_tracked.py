"""Tracked objects into checkpoints and back: continued training is the undisturbed one, bit for bit."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_groups import all_good, run_ranks

from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.state import landing, tensors
from cfe_hpc.checkpoints.state.rng import capture_rng, restore_rng
from cfe_hpc.checkpoints.store import newest, save
from cfe_hpc.checkpoints.tracked import capture, is_trackable, restore
from cfe_hpc.errors import CheckpointMismatch, CorruptCheckpoint


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


def test_fp32_moments_of_bf16_parameters_are_not_rounded(tmp_path: Path) -> None:
    training = Training(seed=1, dtype=torch.bfloat16)
    training.step()
    for state in training.optimizer.state.values():
        state["exp_avg"] = torch.rand(state["exp_avg"].shape)
    put(tmp_path, SoloGroup(), training.objects())
    resumed = Training(seed=2, dtype=torch.bfloat16)
    take(tmp_path, SoloGroup(), resumed.objects())
    pairs = zip(training.optimizer.state.values(), resumed.optimizer.state.values(), strict=True)
    for before, after in pairs:
        assert {key: (value.dtype, value.tolist()) for key, value in before.items()} == {
            key: (value.dtype, value.tolist()) for key, value in after.items()
        }


def together(work, size: int = 2) -> list:
    """`work(rank, group)` on each rank, all good."""
    return all_good(run_ranks(size, lambda group: work(group.rank, group)))


def test_two_ranks_divide_what_is_alike_and_keep_what_is_their_own(tmp_path: Path) -> None:
    trainings = [Training(rank, seed=1, width=3000) for rank in range(2)]
    for training in trainings:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        training.step()
    trainings[1].model[1].running_mean += 1  # BatchNorm's buffers are each rank's own
    together(lambda rank, group: put(tmp_path, group, trainings[rank].objects()))
    sizes = [(tmp_path / "step-000000004" / f"shard-0000{rank}.bin").stat().st_size for rank in range(2)]
    assert max(sizes) - min(sizes) < 40_000 < sum(sizes) / 10

    resumed = [Training(rank + 7, seed=9, width=3000) for rank in range(2)]
    assert together(lambda rank, group: take(tmp_path, group, resumed[rank].objects())) == [4, 4]
    for before, after in zip(trainings, resumed, strict=True):
        assert bits(before.model) == bits(after.model)
        assert before.sampler.state_dict()["position"] == after.sampler.position
        assert torch.equal(before.sampler.weights, after.sampler.weights)
        assert str(before.optimizer.state_dict()) == str(after.optimizer.state_dict())


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_takes_all_that_is_alike(tmp_path: Path, size: int) -> None:
    trainings = [Training(rank, seed=1) for rank in range(2)]
    together(lambda rank, group: put(tmp_path, group, trainings[rank].objects()))
    resumed = [Training(seed=9) for _ in range(size)]
    python = random.getstate()
    together(lambda rank, group: take(tmp_path, group, resumed[rank].objects()), size)
    assert random.getstate() == python
    assert all(bits(each.model) == bits(trainings[0].model) for each in resumed)
    assert [each.sampler.position for each in resumed] == [0, 100, 0][:size]


def test_a_state_goes_straight_into_the_memory_that_is_there(tmp_path: Path) -> None:
    training = Training(seed=1)
    training.step()
    put(tmp_path, SoloGroup(), training.objects())
    resumed = Training(seed=2)
    resumed.step()
    places = [value.data_ptr() for value in memory_of(resumed)]
    take(tmp_path, SoloGroup(), resumed.objects())
    assert [value.data_ptr() for value in memory_of(resumed)] == places
    assert all(map(torch.equal, memory_of(resumed), memory_of(training)))


def memory_of(training: Training) -> list[torch.Tensor]:
    states = training.optimizer.state.values()
    return [*training.model.state_dict().values(), *(value for state in states for value in state.values())]


def test_scattered_memory_is_filled_by_way_of_small_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer

    model, optimizer = build(1)
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    put(tmp_path, SoloGroup(), {"model": model, "optimizer": optimizer})
    monkeypatch.setattr(landing, "LANDING_BYTES", 64)
    resumed, its_optimizer = build(2)
    take(tmp_path, SoloGroup(), {"model": resumed, "optimizer": its_optimizer})
    assert not resumed.weight.is_contiguous() and torch.equal(resumed.weight, model.weight)
    moments = [each.state[each.param_groups[0]["params"][0]]["exp_avg"] for each in (optimizer, its_optimizer)]
    assert torch.equal(*moments) and moments[0].stride() == moments[1].stride()


def test_modules_that_load_in_their_own_way_still_do(tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.note = torch.nn.Parameter(torch.zeros(4)), torch.zeros(2)

        def get_extra_state(self) -> torch.Tensor:
            return self.note

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.note = state

        def _load_from_state_dict(self, state: dict, prefix: str, *rest: object) -> None:
            state[prefix + "weight"] = state[prefix + "weight"] * 2
            super()._load_from_state_dict(state, prefix, *rest)

    model, resumed = Own(), Own()
    torch.nn.init.ones_(model.weight)
    model.note = torch.ones(3)  # of another shape than a new one's
    put(tmp_path, SoloGroup(), {"model": model})
    take(tmp_path, SoloGroup(), {"model": resumed})
    assert resumed.weight.tolist() == [2.0] * 4 and resumed.note.tolist() == [1.0] * 3


def test_bytes_that_one_rank_finds_altered_are_every_ranks_error(tmp_path: Path) -> None:
    class Reads(Halves):
        def load_checkpoint_state(self, reader, tree) -> None:
            super().load_checkpoint_state(reader, tree)
            gate.wait(20)  # a collective: whoever left before would leave the other waiting

    gate = threading.Barrier(2)
    for objects in (
        lambda rank: {"engine": Reads(rank, 2), "more": Reads(rank, 2)},
        lambda rank: {"data": Sampler(rank)},
    ):
        together(lambda rank, group, objects=objects: put(tmp_path, group, objects(rank)))
        path = tmp_path / "step-000000004" / "shard-00001.bin"
        content = bytearray(path.read_bytes())
        content[5000 if "data" not in objects(0) else _offset_of(path, "data/weights")] ^= 1
        path.write_bytes(content)
        errors = run_ranks(2, lambda group, objects=objects: _take_whole(tmp_path, group, objects(group.rank)))
        assert all(isinstance(error, CorruptCheckpoint) for error in errors), errors
        assert len({str(error) for error in errors}) == 1 and "shard-00001.bin is altered" in str(errors[0])


def _take_whole(root: Path, group, objects: dict) -> None:
    restore(Opened.at(root / "step-000000004"), objects, group=group)


def _offset_of(path: Path, name: str) -> int:
    own = json.loads(path.with_suffix(".json").read_text())["own"]
    return next(extent["offset"] for extent in own if extent["name"] == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8], ids=str)
def test_a_sum_on_a_device_tells_tensors_apart(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_SUMMED_BYTES", 64)
    one = torch.arange(100).remainder(2).to(dtype)
    sums = {int(tensors._sum_on_device(one))}
    for index in range(100):
        other = one.clone()
        other[index] = 1 - one[index].to(torch.int64)
        sums.add(int(tensors._sum_on_device(other)))
        other[index - 1] = other[index - 1].logical_not()
        sums.add(int(tensors._sum_on_device(other)))
    assert len(sums) == 201
    assert int(tensors._sum_on_device(one.clone())) in sums


class Halves:
    """A Sharded object: each rank holds its half of a vector."""

    def __init__(self, rank: int, size: int, stage: int = 1) -> None:
        self.low, self.high, self.stage = 1000 * rank // size, 1000 * (rank + 1) // size, stage
        self.part, self.note = torch.arange(float(self.low), float(self.high)), torch.tensor(0.0)

    def checkpoint_layout(self) -> dict:
        return {"zero_stage": self.stage, "names": ("w",)}

    def checkpoint_state(self):
        data = memoryview(self.part.numpy()).cast("B")
        return [Piece(name="w", dtype="float32", shape=(1000,), start=self.low, data=data)], {"n": torch.tensor(2.5)}

    def load_checkpoint_state(self, reader, tree) -> None:
        assert list(reader.names()) == ["w"] and reader.describe("w") == ("float32", (1000,))
        reader.read_into("w", self.low, memoryview(self.part.numpy()).cast("B"))
        self.note = tree["n"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sharded_objects_take_their_intervals_at_any_world_size(tmp_path: Path, size: int) -> None:
    together(lambda rank, group: put(tmp_path, group, {"engine": Halves(rank, 2)}))
    resumed = [Halves(rank, size) for rank in range(size)]
    for each in resumed:
        each.part.zero_()
    together(lambda rank, group: take(tmp_path, group, {"engine": resumed[rank]}), size)
    assert torch.cat([each.part for each in resumed]).tolist() == [float(i) for i in range(1000)]
    assert all(each.note.item() == 2.5 for each in resumed)
    with pytest.raises(CheckpointMismatch, match=r"engine.zero_stage is 1 in the checkpoint and 2 in the job"):
        take(tmp_path, SoloGroup(), {"engine": Halves(0, 1, stage=2)})


def test_random_generators_return() -> None:
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()]

    random.gauss(0, 1)  # half of a pair is kept for later
    state = capture_rng()
    first = draw()
    draw()
    restore_rng(state)
    assert draw() == first


def test_tied_and_wrapped_modules_return(tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model, resumed = build(), build()
    put(tmp_path, SoloGroup(), {"model": torch.nn.DataParallel(model)})
    take(tmp_path, SoloGroup(), {"model": resumed})
    assert bits(model) == bits(resumed) and resumed["head"].weight is resumed["embed"].weight


def test_what_can_be_tracked() -> None:
    assert is_trackable(Sampler(0)) and is_trackable(Halves(0, 1)) and is_trackable(torch.nn.Linear(1, 1))
    assert not is_trackable({}) and not is_trackable(torch.ones(1))
