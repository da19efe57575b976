"""The estimate of memory, against the model itself, the figures of the ZeRO paper, and DeepSpeed's own estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cfe_hpc.config.job import Job
from cfe_hpc.config.site import Site
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.planner.memory import MemoryEstimate, estimate
from cfe_hpc.train.config import Params
from cfe_hpc.train.model import Transformer
from cfe_hpc.train.size import Arithmetic, activation_bytes, largest_layer, parameter_count
from cfe_hpc.units import format_count, parse_count

SITE = Site.model_validate(
    {
        "name": "s",
        "scheduler": "slurm",
        "default_partition": "gpu",
        "partitions": {"gpu": {"hardware": "gpu"}, "cpu": {"hardware": "cpu"}},
        "hardware": {
            "gpu": {"accelerator": "cuda", "devices_per_node": 8, "cores_per_node": 64, "memory": "512GiB"},
            "cpu": {"accelerator": "cpu", "devices_per_node": 8, "cores_per_node": 64, "memory": "512GiB"},
        },
    }
)
SHAPES = (
    {"d_model": 64, "layers": 3, "heads": 4, "seq_len": 32, "vocab_size": 512},
    {"d_model": 128, "layers": 2, "heads": 2, "seq_len": 128, "d_ff": 256, "rope_variant": "irope"},
)
TRAIN: dict[str, Any] = {"entry": "cfe_hpc.train.main:run"}
OTHER: dict[str, Any] = {"command": ["python", "train.py"]}


def _estimate(partition: str = "gpu", nodes: int = 8, **tables: Any) -> MemoryEstimate | None:
    resources = {"nodes": nodes, "partition": partition, "devices_per_node": 8, **tables.pop("resources", {})}
    job = Job.model_validate({"name": "j", "resources": resources, **tables})
    return estimate(job, plan(job, SITE))


def _bytes(found: MemoryEstimate | None) -> dict[str, int]:
    assert found is not None
    return {part.name: part.size_bytes for part in found.parts}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_of_the_model_is_that_of_the_model(shape: dict[str, Any]) -> None:
    params = Params(**shape)
    model = Transformer(params)
    assert parameter_count(params) == sum(weight.numel() for weight in model.parameters())
    assert largest_layer(params) == max(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_keeps(shape: dict[str, Any], arithmetic: Arithmetic) -> None:
    params, micro_batch = Params(**shape), 4
    model = Transformer(params).to(torch.bfloat16 if arithmetic == "bf16" else torch.float32)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(micro_batch, params.seq_len, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"),
    ):
        loss = model(tokens, tokens).mean()
    assert loss.requires_grad
    # Of the logits only the log-softmax is kept; the estimate has what is there beside it for a moment, too.
    beside = micro_batch * params.seq_len * params.vocab_size * (4 if arithmetic == "fp32" else 6)
    expected = activation_bytes(params, micro_batch=micro_batch, arithmetic=arithmetic) - beside
    assert sum(kept.values()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("stage", "paper_gb"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_paper(stage: int, paper_gb: float) -> None:
    # Figure 1 of arXiv 1910.02054: 7.5 thousand million parameters, 64 devices, mixed precision, Adam.
    found = _bytes(
        _estimate(**OTHER, resources={"model_parameters": "7.5B"}, engine={"zero_stage": stage, "precision": "bf16"})
    )
    states = found["weights"] + found["gradients"] + found["optimizer"]
    assert states / 1e9 == pytest.approx(paper_gb, rel=0.02)


@pytest.mark.parametrize(("stage", "whole", "shared"), [(2, 2, 18), (3, 0, 20)])
def test_states_are_those_of_deepspeeds_estimators(stage: int, whole: int, shared: int) -> None:
    # estimate_zero2_model_states_mem_needs: 2 P + 18 P / N. estimate_zero3_…: 18 P / N, where the bf16 gradients are
    # taken to be gone once they are there in fp32.
    engine = {"zero_stage": stage, "precision": "bf16"}
    found = _bytes(_estimate(**OTHER, resources={"model_parameters": "7B"}, engine=engine))
    names = ("weights", "gradients", "gradients in fp32", "optimizer")
    assert sum(found[name] for name in names) == pytest.approx(7e9 * (whole + shared / 64))


@pytest.mark.parametrize(("stage", "shared"), [(2, 4 + 4 + 12), (3, 4 + 4 + 4 + 12)])
def test_zero_in_fp32_steps_on_a_copy_of_its_gradients(stage: int, shared: int) -> None:
    # Counted in real ranks: tests/benchmarks/bench_memory.py.
    found = _bytes(_estimate(**OTHER, resources={"model_parameters": "7B"}, engine={"zero_stage": stage}))
    names = ("weights", "gradients", "gradients in fp32", "optimizer")
    whole = 4 if stage == 2 else 0
    assert sum(found[name] for name in names) == pytest.approx(7e9 * (whole + shared / 64))


def test_offloading_moves_states_to_the_node() -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    engine = {"zero_stage": 2, "precision": "bf16", "deepspeed": offload}
    found = _estimate(**OTHER, resources={"model_parameters": "7B"}, engine=engine)
    assert found is not None
    at = {part.name: part.where for part in found.parts}
    assert (at["weights"], at["optimizer"], at["gradients in fp32"]) == ("device", "node", "node")


def test_buckets_are_as_large_as_they_are_set() -> None:
    zero = {"zero_optimization": {"reduce_bucket_size": 2e8, "overlap_comm": True}}
    engine = {"zero_stage": 1, "precision": "bf16", "deepspeed": zero}
    found = _bytes(_estimate(**OTHER, resources={"model_parameters": "7B"}, engine=engine))
    assert found["reduce buckets"] == 2 * 2 * 2e8
    plain = _bytes(_estimate(**OTHER, resources={"model_parameters": "7B"}, engine={"zero_stage": 1}))
    assert plain["reduce buckets"] == 4 * 5e8


def test_on_cpus_everything_is_the_nodes() -> None:
    found = _estimate("cpu", 1, **TRAIN, engine={"kind": "torch"}, checkpoint={"async": True})
    assert found is not None and found.complete
    assert found.device_bytes == 0
    assert found.node_bytes == 8 * sum(_bytes(found).values())
    assert _bytes(found)["copy for checkpoints"] == -(-12 * found.parameters // 8)
    assert found.checkpoint_bytes == 12 * found.parameters


def test_what_tells_no_size_has_no_estimate() -> None:
    assert _estimate(**OTHER) is None
    stated = _estimate(**OTHER, resources={"model_parameters": "350M"})
    assert stated is not None and (stated.parameters, stated.complete) == (350_000_000, False)


@pytest.mark.parametrize(
    ("text", "count", "shown"), [("7B", 7e9, "7B"), ("1.5T", 1.5e12, "1.5T"), ("350M", 3.5e8, "350M"), ("12", 12, "12")]
)
def test_counts_are_read_and_shown_as_people_say_them(text: str, count: float, shown: str) -> None:
    assert (parse_count(text), format_count(count)) == (count, shown)


def test_what_is_no_count_is_refused() -> None:
    for text in ("", "7 B", "7GB", "-1", "B"):
        with pytest.raises(ValueError, match="not a number"):
            parse_count(text)
    assert (format_count(999.6), format_count(869_504)) == ("1K", "870K")
