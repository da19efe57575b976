"""The DeepSpeed adapter on a user's own engine: what it stores, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from train_ranks import load_sharded, on_ranks, save_sharded

from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint


def user_engine(*, width: int = 6, scheduler: bool = False, prepare: Any = None, **config: Any) -> Any:
    """A user's script: own module with a buffer, own optimizer with two groups."""
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(width, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 5))
    if prepare is not None:
        prepare(model)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) is matrix]} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step) if scheduler else None
    settings = {"train_micro_batch_size_per_gpu": 4, "steps_per_print": 10**9, **config}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine


def train(engine: Any, steps: int) -> None:
    import torch

    for _ in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(engine.global_steps))
        engine.backward(engine(x).square().mean())
        engine.step()


def buffers_schedule_and_counters(rank: int, root: str) -> None:
    import torch

    from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState, is_deepspeed_engine

    zero = {"zero_optimization": {"stage": 1}}
    engine = user_engine(scheduler=True, **zero)
    assert is_deepspeed_engine(engine)
    assert not is_deepspeed_engine(engine.module)
    train(engine, 3)
    save_sharded(Path(root), DeepSpeedState(engine), step=3)
    train(engine, 2)

    fresh = user_engine(scheduler=True, **zero)
    assert load_sharded(Path(root), DeepSpeedState(fresh)) == 3
    assert (fresh.global_steps, fresh.global_samples) == (3, 12)
    assert fresh.get_lr() == pytest.approx([0.1 * 0.9**3] * 2)
    assert fresh.module[1].num_batches_tracked.item() == 3
    train(fresh, 2)
    for (name, mine), (_, theirs) in zip(
        fresh.module.state_dict().items(), engine.module.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert fresh.get_lr() == engine.get_lr()


def test_buffers_schedule_and_counters_come_back(tmp_path: Path) -> None:
    on_ranks(1, buffers_schedule_and_counters, str(tmp_path))


def load_before_any_step(rank: int, root: str) -> None:
    """A checkpoint of step 0 has no moments; an engine resumed from it makes its own."""
    import torch

    from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState

    engine = user_engine(zero_optimization={"stage": 2})
    save_sharded(Path(root), DeepSpeedState(engine), step=0)
    fresh = user_engine(zero_optimization={"stage": 2})
    load_sharded(Path(root), DeepSpeedState(fresh))
    train(engine, 2)
    train(fresh, 2)
    for mine, theirs in zip(fresh.module.parameters(), engine.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_of_before_the_first_step(tmp_path: Path) -> None:
    on_ranks(1, load_before_any_step, str(tmp_path))


def freeze_and_tie(model: Any) -> None:
    model[0].weight.requires_grad_(False)
    model[2].bias = model[0].bias


def frozen_and_tied_without_zero(rank: int, root: str) -> None:
    import torch

    from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState

    engine = user_engine(prepare=freeze_and_tie)
    train(engine, 2)
    save_sharded(Path(root), DeepSpeedState(engine), step=2)
    fresh = user_engine(prepare=freeze_and_tie)
    with torch.no_grad():
        for parameter in fresh.module.parameters():
            parameter.add_(1.0)
    load_sharded(Path(root), DeepSpeedState(fresh))
    train(engine, 2)
    train(fresh, 2)
    assert fresh.module[2].bias is fresh.module[0].bias
    for (name, mine), (_, theirs) in zip(
        fresh.module.state_dict().items(), engine.module.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_frozen_and_tied_parameters_without_zero(tmp_path: Path) -> None:
    on_ranks(1, frozen_and_tied_without_zero, str(tmp_path))


def another_model(rank: int, root: str) -> None:
    from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState

    save_sharded(Path(root), DeepSpeedState(user_engine(zero_optimization={"stage": 1})), step=1)
    other = user_engine(width=7, zero_optimization={"stage": 1})
    before = [parameter.clone() for parameter in other.module.parameters()]
    with pytest.raises(CheckpointMismatch, match=r"parameter 0\.weight is \[5, 7\], in the checkpoint \[5, 6\]"):
        load_sharded(Path(root), DeepSpeedState(other))
    assert all((mine == old).all() for mine, old in zip(other.module.parameters(), before, strict=True))


def test_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    on_ranks(1, another_model, str(tmp_path))


def one_rank_meets_altered_bytes(rank: int, root: str) -> str:
    """Rank 1's own part of the state is altered on the disk; the messages of both ranks."""
    import torch

    from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState

    engine = user_engine(zero_optimization={"stage": 3})
    train(engine, 1)
    save_sharded(Path(root), DeepSpeedState(engine), step=1)
    torch.distributed.barrier()
    if rank == 1:
        with open(Path(root, "step-000000001", "shard-00001.bin"), "r+b") as stream:
            stream.seek(4096)
            byte = stream.read(1)[0]
            stream.seek(4096)
            stream.write(bytes([byte ^ 1]))
    torch.distributed.barrier()
    opened = Opened.at(Path(root, "step-000000001"))
    with pytest.raises(CorruptCheckpoint) as caught:
        DeepSpeedState(engine).load_checkpoint_state(opened.reader, opened.state(rank))
    return str(caught.value)


@pytest.mark.slow
def test_altered_bytes_that_one_rank_meets_are_told_by_all(tmp_path: Path) -> None:
    first, second = on_ranks(2, one_rank_meets_altered_bytes, str(tmp_path))
    assert first == second
    assert first.startswith("rank 1: shard-00001.bin")


REFUSED: dict[str, dict[str, Any]] = {
    "round_robin_gradients": {"stage": 2, "round_robin_gradients": True},
    "offloading": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def refusals(rank: int) -> dict[str, str]:
    from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState

    messages = {}
    for name, zero in REFUSED.items():
        engine = user_engine(zero_optimization=zero, zero_force_ds_cpu_optimizer=False)
        with pytest.raises(CheckpointError) as caught:
            DeepSpeedState(engine)
        messages[name] = str(caught.value)
    return messages


def test_what_cannot_be_laid_out_is_refused_by_name() -> None:
    (messages,) = on_ranks(1, refusals)
    for name, message in messages.items():
        assert name in message
        assert "save_checkpoint" in message


def negative_zero(rank: int) -> list[bytes]:
    """consolidated() hands over bits, not sums: -0.0 stays -0.0, and a NaN keeps its payload."""
    import torch

    from cfe_hpc.checkpoints.state.deepspeed import DeepSpeedState

    engine = user_engine(zero_optimization={"stage": 2})
    for master in engine.optimizer.single_partition_of_fp32_groups:
        master.data.fill_(-0.0)
    return [tensor.view(torch.int32).numpy().tobytes() for _, tensor in DeepSpeedState(engine).consolidated()]


@pytest.mark.slow
def test_consolidated_parameters_are_exact() -> None:
    for parts in on_ranks(2, negative_zero):
        assert {word for part in parts for word in [part[i : i + 4] for i in range(0, len(part), 4)]} == {
            b"\x00\x00\x00\x80"
        }
