"""An engine stopped and resumed in fresh processes ends with the bits of one that was not: every ZeRO stage."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
from train_ranks import digest, gloo_group, load_sharded, on_ranks, save_sharded

from cfe_hpc.config.job import Engine as EngineSpec

STEPS, STOP_AT = 7, 3
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
SPECS = {
    f"zero{stage}-{precision}": EngineSpec(zero_stage=stage, precision=precision)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
} | {
    "zero1-bf16-fp32-gradients": EngineSpec(zero_stage=1, precision="bf16", deepspeed=FP32_ACCUMULATION),
    "zero2-bf16-fp32-gradients": EngineSpec(zero_stage=2, precision="bf16", deepspeed=FP32_ACCUMULATION),
    "zero3-fp32-sub-groups": EngineSpec(
        zero_stage=3, deepspeed={"zero_optimization": {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}}
    ),
}


def make(spec: EngineSpec, *, seed: int, world_size: int) -> Any:
    import torch

    from cfe_hpc.train.config import Params
    from cfe_hpc.train.engine import make_engine
    from cfe_hpc.train.model import Transformer

    # An odd width and 24 windows: partitions end inside parameters, and need padding.
    params = Params(d_model=18, layers=2, heads=3, seq_len=16, global_batch=24, micro_batch=3, lr=1e-2, steps=STEPS)
    torch.manual_seed(seed)
    model = Transformer(params)
    accumulate = params.global_batch // params.micro_batch // world_size
    device = torch.device("cpu")
    return params, make_engine(spec, params, model, device=device, accumulate=accumulate, world_size=world_size)


def train(
    params: Any, engine: Any, first: int, last: int, *, rank: int, world_size: int, scale: float = 1.0
) -> list[float]:
    """Steps [first, last) on data that depend on the step alone; the norms of their gradients."""
    import torch

    from cfe_hpc.train.optim import rate_at

    norms = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 + step)
        windows = torch.randint(0, 256, (params.global_batch, params.seq_len + 1), generator=generator)
        micros = windows.chunk(world_size)[rank].split(params.micro_batch)
        for index, micro in enumerate(micros):
            engine.forward_backward(micro[:, :-1], micro[:, 1:], is_last=index == len(micros) - 1)
        norms.append(float(engine.step(rate_at(step, params) * scale)))
    return norms


def undisturbed(rank: int, names: list[str], root: str, world_size: int) -> dict[str, Any]:
    """Train each engine to the end, saving on the way."""
    results = {}
    for name in names:
        params, engine = make(SPECS[name], seed=1, world_size=world_size)
        state = engine.tracked()["engine"]
        norms = train(params, engine, 0, STOP_AT, rank=rank, world_size=world_size)
        save_sharded(Path(root, name), state, step=STOP_AT)
        norms += train(params, engine, STOP_AT, STEPS, rank=rank, world_size=world_size)
        weights = {parameter: tensor.clone() for parameter, tensor in state.consolidated()}
        results[name] = {"digest": digest(weights.items()), "norms": norms, "order": list(weights)}
        spoilt = spoil(params, engine, state.consolidated, rank=rank, world_size=world_size)
        first = load_sharded(Path(root, name), state)
        norms = train(params, engine, first, STEPS, rank=rank, world_size=world_size)
        results[name]["back"] = {"digest": digest(state.consolidated()), "norms": norms, "spoilt": spoilt}
    return results


def spoil(params: Any, engine: Any, weights: Any, *, rank: int, world_size: int) -> bool:
    """Make every weight NaN, and then gradients and moments as far as the engine takes them; whether they are."""
    train(params, engine, 0, 1, rank=rank, world_size=world_size, scale=float("nan"))
    train(params, engine, 1, 2, rank=rank, world_size=world_size)
    return all(tensor.isnan().all() for _, tensor in weights())


def resumed(rank: int, names: list[str], root: str, world_size: int) -> dict[str, Any]:
    """Other initial weights, the checkpoint, and the rest of the steps."""
    results = {}
    for name in names:
        params, engine = make(SPECS[name], seed=2, world_size=world_size)
        state = engine.tracked()["engine"]
        before = digest(state.consolidated())
        first = load_sharded(Path(root, name), state)
        norms = train(params, engine, first, STEPS, rank=rank, world_size=world_size)
        weights = {parameter: tensor.clone() for parameter, tensor in state.consolidated()}
        results[name] = {"digest": digest(weights.items()), "norms": norms, "before": before}
        results[name]["weights"] = {parameter: tensor.numpy() for parameter, tensor in weights.items()}
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("checkpoints")
    return root, on_ranks(2, undisturbed, list(SPECS), str(root), 2)


@pytest.fixture(scope="module")
def again(saved: tuple[Path, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return on_ranks(2, resumed, list(SPECS), str(saved[0]), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_resume_at_the_same_world_size_is_bit_exact(name: str, saved: Any, again: Any) -> None:
    for rank in (0, 1):
        reference, result = saved[1][rank][name], again[rank][name]
        assert result["norms"] == reference["norms"][STOP_AT:]
        assert result["digest"] == reference["digest"] != result["before"]
        assert reference["order"] == sorted(reference["order"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_going_back_in_the_same_process_is_bit_exact(name: str, saved: Any) -> None:
    for rank in (0, 1):
        reference = saved[1][rank][name]
        assert reference["back"]["spoilt"]
        assert reference["back"]["norms"] == reference["norms"][STOP_AT:]
        assert reference["back"]["digest"] == reference["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_resume_at_another_world_size_goes_on_from_the_same_state(world_size: int, saved: Any, again: Any) -> None:
    names = [name for name in SPECS if "fp32" in name and "bf16" not in name]
    for rank, results in enumerate(on_ranks(world_size, resumed, names, str(saved[0]), world_size)):
        for name in names:
            reference = saved[1][0][name]["norms"][STOP_AT:]
            assert results[name]["norms"] == pytest.approx(reference, rel=1e-4), (rank, name)
            for parameter, expected in again[0][name]["weights"].items():
                numpy.testing.assert_allclose(results[name]["weights"][parameter], expected, rtol=1e-4, atol=1e-5)


def ddp(rank: int, root: str, seed: int, first: int, last: int) -> list[tuple[list[float], str]]:
    """Steps [first, last) of plain torch on three ranks, from the newest checkpoint to one of the last step; and the
    same once more after going back there in this very process, from weights and moments of NaN."""
    from cfe_hpc.checkpoints.store import resume, save
    from cfe_hpc.checkpoints.tracked import capture, restore

    group = gloo_group()
    params, engine = make(EngineSpec(kind="torch"), seed=seed, world_size=3)
    tracked = engine.tracked()
    load = partial(restore, objects=tracked, group=group)
    opened = resume(Path(root), load, run_id="r", attempt=first, group=group)
    assert (opened.step if opened else 0) == first
    norms = train(params, engine, first, last, rank=rank, world_size=3)
    content = capture(tracked, group=group)
    save(Path(root), content, step=last, attempt=first, run_id="r", group=group)
    results = [(norms, digest(sorted(tracked["model"].state_dict().items())))]
    if first:
        spoil(params, engine, tracked["model"].state_dict().items, rank=rank, world_size=3)
        assert resume(Path(root), load, run_id="r", attempt=first, group=group, below=last).step == first
        norms = train(params, engine, first, last, rank=rank, world_size=3)
        results.append((norms, digest(sorted(tracked["model"].state_dict().items()))))
    return results


@pytest.mark.slow
def test_plain_torch_on_three_ranks_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = on_ranks(3, ddp, str(tmp_path / "whole"), 1, 0, STEPS)
    parts = [on_ranks(3, ddp, str(tmp_path / "parts"), *words) for words in ((1, 0, STOP_AT), (2, STOP_AT, STEPS))]
    for rank in range(3):
        ((norms, weights),) = whole[rank]
        for again in parts[1][rank]:  # resumed, and gone back
            assert (parts[0][rank][0][0] + again[0], again[1]) == (norms, weights)
        assert len(parts[1][rank]) == 2
