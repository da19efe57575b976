"""[params] of the training that ships, its learning rate, and its parameter groups."""

from __future__ import annotations

import pytest

from cfe_hpc.config.job import Engine as EngineSpec
from cfe_hpc.config.load import load
from cfe_hpc.errors import ConfigError
from cfe_hpc.train.config import Params, fitted_batch, grad_accum_steps, read_params
from cfe_hpc.train.engine_deepspeed import deepspeed_config
from cfe_hpc.train.model import Transformer
from cfe_hpc.train.optim import parameter_groups, rate_at


def problems(table: dict[str, object], **more: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_params(table, file="jobs/x.toml", **more)
    return str(caught.value).splitlines()


def test_every_problem_is_named_at_once() -> None:
    found = problems({"d_modle": 8, "lr": "fast", "layers": 0, "rope_variant": "irpoe", "beta1": 1.0})
    assert [line.split(": ")[1] for line in found] == [
        "params.layers",
        "params.rope_variant",
        "params.lr",
        "params.beta1",
        "params.d_modle",
    ]
    assert all(line.startswith("jobs/x.toml: params.") and "; " in line for line in found)
    assert "did you mean d_model?" in found[-1]
    assert 'did you mean "irope"?' in found[1]


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        ({"d_model": 100, "heads": 3}, "params.d_model", "does not divide by heads = 3 (100)"),
        ({"d_model": 12, "heads": 4}, "params.heads", "odd width 3"),
        ({"steps": 10, "warmup_steps": 11}, "params.warmup_steps", "longer than the run (11)"),
    ],
)
def test_values_that_do_not_go_together(table: dict[str, object], key: str, words: str) -> None:
    (line,) = problems(table)
    assert line.startswith(f"jobs/x.toml: {key}: ")
    assert words in line


def test_a_problem_is_reported_where_its_value_came_from() -> None:
    origins = {"job.params.irope_groups": "CFE_IROPE_GROUPS"}
    (line,) = problems({"irope_groups": 0}, origins=origins)
    assert line.startswith("CFE_IROPE_GROUPS: params.irope_groups: ")


@pytest.mark.parametrize("job", ["train_seq", "smoke_2rank"])
def test_shipped_jobs_are_good(job: str) -> None:
    loaded = load(job, "local")
    params = read_params(loaded.job.params, file=job)
    assert grad_accum_steps(params, world_size=2, file=job) == 1


def test_the_batch_is_shared_among_ranks() -> None:
    params = Params(global_batch=48, micro_batch=4)
    assert [grad_accum_steps(params, world_size=world, file="x") for world in (1, 2, 3, 12)] == [12, 6, 4, 1]
    for world in (5, 24):
        with pytest.raises(ConfigError, match=r"params\.global_batch: does not divide among"):
            grad_accum_steps(params, world_size=world, file="x")


def fitted(world_size: int, limit: int, *, planned: int = 8, global_batch: int = 48, micro_batch: int = 6) -> object:
    params = Params(global_batch=global_batch, micro_batch=micro_batch)
    return fitted_batch(params, world_size=world_size, planned_world_size=planned, limit=limit, file="x")


def test_a_step_has_the_same_global_batch_whatever_happens() -> None:
    assert fitted(8, 6) == (6, 1)
    # fewer ranks: the job's micro-batch where it divides the share, and else the next smaller that does
    assert [fitted(world, 6) for world in (6, 4, 3, 2, 1)] == [(4, 2), (6, 2), (4, 4), (6, 4), (6, 8)]
    # halved once and twice, and as far as it goes
    assert [fitted(8, limit) for limit in (3, 1)] == [(3, 2), (1, 6)]
    assert fitted(4, 1) == (1, 12)
    for world, limit in ((8, 6), (6, 6), (3, 3), (2, 1), (1, 5)):
        micro, accumulate = fitted(world, limit)  # type: ignore[misc]
        assert micro * accumulate * world == 48 and micro <= limit


def test_ranks_that_cannot_share_the_batch_are_named() -> None:
    for world in (5, 7):
        with pytest.raises(ConfigError, match=rf"params\.global_batch: .*{world} ranks, instead of the 8 planned"):
            fitted(world, 6)
    with pytest.raises(ConfigError, match="does not divide among 8 ranks with micro_batch = 5"):
        fitted(4, 5, micro_batch=5)


def test_the_rate_rises_then_falls_along_a_cosine() -> None:
    params = Params(steps=110, warmup_steps=10, lr=1.0, min_lr_ratio=0.1)
    assert [rate_at(step, params) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate_at(109, params) == pytest.approx(0.1)
    falling = [rate_at(step, params) for step in range(10, 110)]
    assert falling == sorted(falling, reverse=True)
    assert (falling[49] + falling[50]) / 2 == pytest.approx(0.55)
    assert rate_at(0, Params(steps=1, warmup_steps=0, lr=1.0)) == 1.0


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Transformer(Params(d_model=16, layers=2, heads=2))
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {weight.dim() for weight in decayed["params"]} == {2}
    assert {weight.dim() for weight in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_deepspeed_keys_are_merged_over_ours() -> None:
    zero = {"zero_optimization": {"overlap_comm": True}}
    spec = EngineSpec(zero_stage=2, precision="bf16", deepspeed={**zero, "wall_clock_breakdown": True})
    config = deepspeed_config(spec, Params(), accumulate=3)
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["wall_clock_breakdown"] is True
    assert config["gradient_accumulation_steps"] == 3
    assert config["steps_per_print"] > 0


def test_deepspeed_keys_that_the_job_decides_elsewhere_are_refused() -> None:
    over = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(EngineSpec(deepspeed=over), Params(), accumulate=1)
    assert [problem.key for problem in caught.value.problems] == [
        "engine.deepspeed.train_batch_size",
        "engine.deepspeed.bf16",
        "engine.deepspeed.zero_optimization.stage",
    ]
