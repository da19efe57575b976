"""The job's `[params]` for the training that cfe_hpc ships."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from cfe_hpc.config.base import Strict
from cfe_hpc.config.problems import translate
from cfe_hpc.errors import ConfigError, Problem

__all__ = ["Params", "fitted_batch", "grad_accum_steps", "read_params"]


class Params(Strict):
    """`[params]` of a job whose entry is `cfe_hpc.train.main:run`."""

    data: str = Field(
        "stdlib",
        min_length=1,
        description='token file made by `data build`, relative to the folder of submission; "stdlib" builds one from '
        "the source of the running Python's standard library",
    )
    vocab_size: int = Field(256, ge=2, le=65536, description="token ids of the file are below this; 256 for bytes")

    d_model: int = Field(128, ge=2, description="width of the residual stream; divides by heads")
    layers: int = Field(4, ge=1, description="transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads; d_model / heads must be even")
    d_ff: int | None = Field(None, ge=1, description="width inside the SwiGLU; 8/3 d_model, rounded up to 32, if None")
    rope_variant: Literal["rope", "irope"] = Field("rope", description="positions in every layer, or interleaved")
    irope_groups: int = Field(2, ge=1, description="with irope, every so-many-th layer has no positions")
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary wavelengths")

    seq_len: int = Field(256, ge=2, description="tokens predicted in one sequence")
    global_batch: int = Field(16, ge=1, description="sequences in one optimizer step, over all ranks")
    micro_batch: int = Field(8, ge=1, description="sequences in one forward pass on one rank")

    steps: int = Field(400, ge=1, description="optimizer steps of the whole run")
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="rate at the last step, as a share of lr")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; vectors have none")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the gradient's square")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the gradient over all parameters; 0: no limit")
    seed: int = Field(0, ge=0, description="of the initial weights and of the order of the data")

    eval_every: int = Field(100, ge=0, description="steps from one evaluation to the next; 0: only first and last")
    eval_batches: int = Field(8, ge=1, description="micro batches of each rank in one evaluation")

    gate_mode: Literal["off"] = Field(
        "off", description="gates on the dynamics; this version measures none, so only off"
    )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

    @property
    def ff_dim(self) -> int:
        """Width inside the feed-forward block."""
        return self.d_ff or -(-8 * self.d_model // 3 // 32) * 32

    def facts(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the job that resumes from it."""
        names = ("vocab_size", "d_model", "layers", "heads", "rope_variant", "rope_theta", "seq_len", "global_batch")
        facts = {name: getattr(self, name) for name in names}
        groups = self.irope_groups if self.rope_variant == "irope" else None
        return {**facts, "ff_dim": self.ff_dim, "irope_groups": groups, "seed": self.seed}


class _Table(Strict):
    params: Params


def read_params(table: Mapping[str, Any], *, file: str, origins: Mapping[str, str] | None = None) -> Params:
    """Check a `[params]` table.

    Args:
        table: as it stands in the job.
        file: name of the job file, for messages.
        origins: dotted key to where its value came from ("job.params.lr"), when that is not the file.

    Raises:
        ConfigError: with every problem of the table.
    """
    known = origins or {}

    def origin(path: tuple[int | str, ...]) -> str:
        return known.get(".".join(("job", *map(str, path))), file)

    try:
        params = _Table.model_validate({"params": dict(table)}).params
    except ValidationError as error:
        found = translate(error.errors(include_url=False), _Table, origin)
        raise ConfigError([problem for _, problem in found]) from error
    problems = [
        Problem(file=origin(("params", name)), key=f"params.{name}", what=what, value=value, remedy=remedy, check=check)
        for name, what, value, remedy, check in _conflicts(params)
    ]
    if problems:
        raise ConfigError(problems)
    return params


def _conflicts(params: Params) -> Iterator[tuple[str, str, Any, str, str]]:
    """(key, what is wrong, value, remedy, check) of values that are good each but not together."""
    if params.d_model % params.heads:
        yield (
            "d_model",
            f"does not divide by heads = {params.heads}",
            params.d_model,
            "change one of them",
            "head-dimensions",
        )
    elif params.head_dim % 2:
        remedy = "choose heads so that d_model / heads is even: positions rotate pairs"
        yield "heads", f"gives heads of odd width {params.head_dim}", params.heads, remedy, "head-dimensions"
    if params.warmup_steps > params.steps:
        remedy = f"warm up within the run's {params.steps} steps"
        yield "warmup_steps", "is longer than the run", params.warmup_steps, remedy, "schema"


def grad_accum_steps(params: Params, *, world_size: int, file: str) -> int:
    """Micro batches of one rank in one optimizer step: global_batch / (micro_batch * world_size).

    Raises:
        ConfigError: global_batch does not divide that way.
    """
    accum, rest = divmod(params.global_batch, params.micro_batch * world_size)
    if rest or accum == 0:
        remedy = f"make it a multiple of {params.micro_batch * world_size} or change micro_batch"
        what = f"does not divide among {world_size} ranks with micro_batch = {params.micro_batch}"
        value = params.global_batch
        problem = Problem(file=file, key="params.global_batch", what=what, value=value, remedy=remedy, check="batch")
        raise ConfigError([problem])
    return accum


def fitted_batch(params: Params, *, world_size: int, planned_world_size: int, limit: int, file: str) -> tuple[int, int]:
    """(sequences in one forward pass, passes in one step) of a rank, for the same global batch whatever happens.

    As the job says at the planned world size. With fewer ranks, or after device memory ran out, the largest
    micro-batch within the limit that divides the rank's share.

    Args:
        limit: most sequences in one forward pass; the job's micro_batch, unless that was too much.

    Raises:
        ConfigError: global_batch does not divide among the planned ranks with the job's micro_batch, or not among the
            ranks there are.
    """
    accumulate = grad_accum_steps(params, world_size=planned_world_size, file=file)
    if world_size == planned_world_size and limit == params.micro_batch:
        return params.micro_batch, accumulate
    share, rest = divmod(params.global_batch, world_size)
    if rest or not share:
        remedy = f"make it a multiple of {world_size}, or set launch.nodes_min so that there are never as few ranks"
        what = f"does not divide among {world_size} ranks, instead of the {planned_world_size} planned"
        raise ConfigError(
            [Problem(file=file, key="params.global_batch", what=what, value=params.global_batch, remedy=remedy)]
        )
    micro = next(size for size in range(min(limit, share), 0, -1) if share % size == 0)
    return micro, share // micro
