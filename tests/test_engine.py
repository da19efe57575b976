"""Engines against each other: accumulation, several ranks, and DeepSpeed against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
from train_ranks import on_ranks

from cfe_hpc.config.job import Engine as EngineSpec

STEPS = 4
TORCH = EngineSpec(kind="torch")


def final_weights(rank: int, spec: EngineSpec, micro_batch: int, world_size: int, grad_clip: float) -> dict[str, Any]:
    """Weights, losses and gradient norms after a few steps on fixed data."""
    import torch

    from cfe_hpc.train.config import Params
    from cfe_hpc.train.engine import make_engine
    from cfe_hpc.train.model import Transformer
    from cfe_hpc.train.optim import rate_at

    params = Params(
        d_model=16, layers=2, heads=2, seq_len=16, global_batch=8, micro_batch=micro_batch, steps=STEPS,
        warmup_steps=0, grad_clip=grad_clip,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(params)
    accumulate = 8 // micro_batch // world_size
    device = torch.device("cpu")
    engine = make_engine(spec, params, model, device=device, accumulate=accumulate, world_size=world_size)
    losses, norms = [], []
    for step in range(STEPS):
        windows = torch.randint(0, 256, (8, 17), generator=torch.Generator().manual_seed(step))
        micros = windows.chunk(world_size)[rank].split(micro_batch)
        micro_losses = [
            engine.forward_backward(micro[:, :-1], micro[:, 1:], is_last=index == len(micros) - 1)
            for index, micro in enumerate(micros)
        ]
        norms.append(float(engine.step(rate_at(step, params))))
        losses.append(float(torch.stack(micro_losses).mean()))
    held_out = engine.evaluate(windows[:, :-1], windows[:, 1:])
    (tracked, *_) = engine.tracked().values()
    tracked = getattr(tracked, "module", tracked)  # inside DistributedDataParallel
    named = tracked.consolidated() if hasattr(tracked, "consolidated") else tracked.named_parameters()
    weights = {name: weight.detach().clone().numpy() for name, weight in named}
    return {"weights": weights, "losses": losses, "norms": norms, "held_out": held_out.tolist()}


def assert_close(result: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    import numpy

    assert result["norms"] == pytest.approx(expected["norms"], rel=tolerance)
    assert result["held_out"] == pytest.approx(expected["held_out"], rel=tolerance)
    for name, weight in expected["weights"].items():
        numpy.testing.assert_allclose(result["weights"][name], weight, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module", params=[0.0, 0.2], ids=["unclipped", "clipped"])
def clip(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture(scope="module")
def reference(clip: float) -> dict[str, Any]:
    """One process, torch, the whole batch at once."""
    return final_weights(0, TORCH, 8, 1, clip)


def test_accumulated_micro_batches_equal_the_big_batch(reference: dict[str, Any], clip: float) -> None:
    result = final_weights(0, TORCH, 2, 1, clip)
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert_close(result, reference, 1e-4)


def test_clipping_changes_the_course() -> None:
    free, clipped = (final_weights(0, TORCH, 8, 1, limit) for limit in (0.0, 0.2))
    assert free["norms"][0] == clipped["norms"][0] > 0.2
    assert free["norms"][2:] != clipped["norms"][2:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["torch", 0, 1, 2, 3])
def test_two_ranks_of_any_engine_train_the_same_model(stage: Any, reference: dict[str, Any], clip: float) -> None:
    spec = TORCH if stage == "torch" else EngineSpec(zero_stage=stage)
    for result in on_ranks(2, final_weights, spec, 2, 2, clip):
        assert_close(result, reference, 1e-4)


@pytest.mark.slow
def test_bf16_stays_near_fp32() -> None:
    expected = final_weights(0, TORCH, 8, 1, 1.0)
    autocast = final_weights(0, EngineSpec(kind="torch", precision="bf16"), 8, 1, 1.0)
    assert autocast["held_out"] == pytest.approx(expected["held_out"], rel=0.02)
    assert autocast["held_out"] != expected["held_out"]
    (deepspeed,) = on_ranks(1, final_weights, EngineSpec(zero_stage=2, precision="bf16"), 8, 1, 1.0)
    assert deepspeed["held_out"] == pytest.approx(expected["held_out"], rel=0.05)
