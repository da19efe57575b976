"""What test_resharding.py runs on its ranks: each engine trains a small model, saves it, resumes at another size.

The model is all that partitioning finds hard: odd sizes, parameters smaller than the number of ranks, a frozen and a
tied one. Two groups (decay, no decay), a warm-up, clipping by norm, and one global batch whatever the world size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from train_ranks import gloo_group

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
FP32 = ("ddp", "fsdp2", *ZERO)
BF16 = (*(f"{name}-bf16" for name in ZERO), "zero1-bf16-fp32grads")
SIZES = (1, 2, 3, 4)
GLOBAL_BATCH = 12
SAVED_AT = 6
WARMUP = 10
Kinds = dict[str, dict[str, str]]


class Training:
    """One engine on this rank of `world` ranks."""

    def __init__(self, engine: str, *, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.name, self.dtype = engine, torch.bfloat16 if "bf16" in engine else torch.float32
        self.module = make_model()
        if engine == "fsdp2":
            torch.distributed.fsdp.fully_shard(self.module[2])
            torch.distributed.fsdp.fully_shard(self.module)
        groups = parameter_groups(self.module)
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
        self.model, self.deepspeed = self.module, None
        if engine == "ddp":
            self.model = torch.nn.parallel.DistributedDataParallel(self.module)
            # DDP orders its buckets anew after the first backward pass of a process, which changes how gradients of
            # three and more ranks round: an unused pass first, and resuming is no different from going on.
            self.model(torch.zeros(1, 7)).sum().backward()
        elif engine != "fsdp2":
            self.deepspeed = self.model = self._initialize(ZERO[engine.partition("-")[0]])

    def _initialize(self, stage: int) -> Any:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // self.world,
            "steps_per_print": 10**9,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": "bf16" in self.name},
            "data_types": {"grad_accum_dtype": "fp32" if "fp32grads" in self.name else None},
            # A threshold between the parameters' sizes: some stay whole on every rank, some do not.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40, "reduce_bucket_size": 1000},
        }
        engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            config=config,
            dist_init_required=False,
        )
        return engine

    def tracked(self) -> dict[str, Any]:
        if self.deepspeed is not None:
            return {"engine": self.deepspeed}
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def train(self, first: int, last: int) -> list[float]:
        """Steps [first, last); the loss of each over the global batch, the same on every rank."""
        return [self._step(step) for step in range(first, last)]

    def _step(self, step: int) -> float:
        import torch

        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(GLOBAL_BATCH, 7, generator=generator)
        mine = batch.chunk(self.world)[self.rank].to(self.dtype)
        loss = (self.model(mine).float() - mine.float().cumsum(1)[:, :5]).square().mean()
        if self.deepspeed is not None:
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        else:
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
        total = loss.detach().double()
        torch.distributed.all_reduce(total)
        return total.item() / self.world

    def whole(self) -> Kinds:
        """SHA-256 of each whole parameter and moment, put together from all ranks without cfe_hpc's help."""
        parts = self._whole_deepspeed() if self.deepspeed is not None else self._whole_torch()
        digests: Kinds = {}
        for kind, name, tensor in parts:
            content = tensor.detach().contiguous().numpy().tobytes()
            digests.setdefault(kind, {})[name] = hashlib.sha256(content).hexdigest()
        return digests

    def _whole_torch(self) -> Iterator[tuple[str, str, Any]]:
        for name, parameter in self.module.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            for kind, tensor in {"weight": parameter, **state}.items():
                yield kind, name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _whole_deepspeed(self) -> Iterator[tuple[str, str, Any]]:
        import torch

        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        stage3 = self.deepspeed.zero_optimization_stage() == 3
        for parameters, master in self._flat_groups():
            state = self.deepspeed.optimizer.optimizer.state[master]
            for kind, mine in {"weight": master, **state}.items():
                if kind == "step":
                    yield from ((kind, names[id(parameter)], mine) for parameter in parameters)
                    continue
                every = [torch.empty_like(mine) for _ in range(self.world)]
                torch.distributed.all_gather(every, mine.detach())
                yield from (
                    (kind, names[id(parameter)], tensor) for parameter, tensor in _cut(every, parameters, stage3)
                )
        yield from (("forward", name, tensor) for name, tensor in self._forward_weights())

    def _flat_groups(self) -> Iterator[tuple[list[Any], Any]]:
        """Each group's parameters, and this rank's part of their flat masters."""
        zero = self.deepspeed.optimizer
        kind = type(zero).__name__
        if kind == "BF16_Optimizer":
            return zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True)
        if kind == "DeepSpeedZeroOptimizer_Stage3":
            return zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
        return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)

    def _forward_weights(self) -> Iterator[tuple[str, Any]]:
        """The weights that the next forward pass sees, frozen ones included."""
        import deepspeed
        import torch

        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name, parameter.detach().clone().view(-1).view(torch.uint8)


def _cut(every: list[Any], parameters: list[Any], stage3: bool) -> Iterator[tuple[Any, Any]]:
    """(parameter, its elements) of a group's flat tensor, of which each rank holds one of `every`."""
    import torch

    offset = 0
    for parameter in parameters:
        if stage3:  # each parameter in as many equal parts as there are ranks
            part = -(-parameter.ds_numel // len(every))
            yield parameter, torch.cat([flat[offset : offset + part] for flat in every])[: parameter.ds_numel]
            offset += part
        else:  # all parameters end to end, in equal parts
            yield parameter, torch.cat(every)[offset : offset + parameter.numel()]
            offset += parameter.numel()


def make_model() -> Any:
    import torch

    class Scaled(torch.nn.Module):
        """A trained factor of one element, a frozen one of five."""

        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(1))
            self.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)
            self.register_buffer("offset", torch.randn(3))

        def forward(self, x: Any) -> Any:
            return x * self.factor * self.frozen + self.offset.sum().to(x.dtype)

    first = torch.nn.Linear(7, 13)
    middle = torch.nn.Sequential(torch.nn.Linear(13, 13), torch.nn.LayerNorm(13), torch.nn.Tanh())
    last = torch.nn.Linear(13, 5)
    middle[0].bias = first.bias
    return torch.nn.Sequential(first, middle, last, Scaled())


def parameter_groups(module: Any) -> list[dict[str, Any]]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def originals(rank: int, engines: tuple[str, ...], root: str, more: int) -> dict[str, dict[str, Any]]:
    """Train each engine, save it on the way, and go on undisturbed for `more` steps."""
    from cfe_hpc.checkpoints.store import save
    from cfe_hpc.checkpoints.tracked import capture

    results, group = {}, gloo_group()
    for engine in engines:
        training = Training(engine, seed=1)
        training.train(0, SAVED_AT)
        content = capture(training.tracked(), group=group)
        folder = Path(root, f"{engine}-{group.size}")
        save(folder, content, step=SAVED_AT, attempt=0, run_id="r", group=group)
        whole = training.whole()
        results[engine] = {"whole": whole, "losses": training.train(SAVED_AT, SAVED_AT + more)}
    return results


def resumed(rank: int, wanted: list[tuple[str, int, int]], root: str) -> dict[tuple[str, int], dict[str, Any]]:
    """For each (engine, ranks that saved, more steps): other weights, the checkpoint, and so many steps."""
    from cfe_hpc.checkpoints.store import resume
    from cfe_hpc.checkpoints.tracked import restore

    results, group = {}, gloo_group()
    for engine, saved_by, more in wanted:
        training = Training(engine, seed=2)
        opened = resume(
            Path(root, f"{engine}-{saved_by}"),
            partial(restore, objects=training.tracked(), group=group),
            run_id="r",
            attempt=1,
            group=group,
        )
        assert opened is not None
        whole = training.whole()
        losses = training.train(opened.step, opened.step + more)
        results[engine, saved_by] = {"whole": whole, "losses": losses}
    return results
