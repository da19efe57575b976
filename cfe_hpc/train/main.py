"""The job entry `cfe_hpc.train.main:run`: train a transformer on tokens until the job's steps are done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from cfe_hpc.config.run import RunSpec
from cfe_hpc.data.loader import BatchLoader, TokenWindows, eval_batches
from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.ranks.run import Run
from cfe_hpc.train.config import Params, fitted_batch, read_params
from cfe_hpc.train.corpus import token_file
from cfe_hpc.train.engine import TrainingEngine, make_engine
from cfe_hpc.train.evaluate import Evaluations, averaging_over_ranks, held_out_loss
from cfe_hpc.train.model import Transformer
from cfe_hpc.train.optim import rate_at

__all__ = ["run", "train_step"]


def run(run: Run) -> None:
    """Train. Every rank calls it; it returns when all steps are done, and SystemExit leaves it when told to stop.

    Raises:
        ConfigError: the job's [params] or [engine.deepspeed] are wrong; holds every problem.
        DataError: the token file is missing, damaged or too short.
        CheckpointMismatch: the run folder's checkpoints are of another model or variant.
    """
    job_file = run.spec.provenance.job_file
    params = read_params(run.params, file=job_file, origins=run.spec.origins)
    planned = run.spec.plan.world_size
    # The same windows with fewer ranks, and with smaller passes.
    evaluated = params.eval_batches * params.micro_batch * planned
    limit = run.micro_batch(params.micro_batch)
    micro_batch, accumulate = fitted_batch(
        params, world_size=run.world_size, planned_world_size=planned, limit=limit, file=job_file
    )
    params = params.model_copy(update={"micro_batch": micro_batch})
    device = torch.device(run.device)
    run.init_distributed()

    loader, held_out = _data(run, params)
    torch.manual_seed(params.seed)  # the same weights on every rank
    model = Transformer(params)
    engine = make_engine(
        run.spec.job.engine, params, model, device=device, accumulate=accumulate, world_size=run.world_size
    )
    evaluations = Evaluations(params)
    run.track(**engine.tracked(), data=loader, evaluations=evaluations)
    run.expect(**params.facts())

    def evaluate(check_stop: Callable[[], None]) -> None:
        with run.phase("evaluation"):
            loss = measure(check_stop)
        evaluations.finished(loss)
        run.log(val_loss=loss)

    def measure(check_stop: Callable[[], None]) -> float:
        batches = eval_batches(
            held_out,
            batch=params.micro_batch,
            rank=run.rank,
            world_size=run.world_size,
            limit=evaluated,
        )
        return held_out_loss(engine, batches, device=device, between=check_stop)

    for step in run.steps(params.steps):
        if evaluations.due is not None:  # before the first step, or cut short by a stop
            evaluate(lambda: run.check_stop(updated=False))
        rate, epoch = rate_at(step, params) * run.lr_scale, loader.epoch
        logged = (step + 1) % run.spec.job.metrics.every_steps == 0
        with run.phase("data"):
            windows = torch.from_numpy(loader.next_batch()).to(device)
        loss, norm = train_step(engine, windows, rate, accumulate=accumulate, mean_loss=logged)
        run.log(loss=loss, grad_norm=norm, lr=rate, tokens=params.global_batch * params.seq_len)
        if loader.epoch > epoch:
            run.end_epoch(epoch)
        if evaluations.step_done(step + 1):
            evaluate(run.check_stop)
    if evaluations.due is not None:  # a stop cut the last one short, when all steps were done
        evaluate(lambda: None)
    run.finish(metrics={"val_loss": evaluations.last or 0.0, "first_val_loss": evaluations.first or 0.0})


def _data(run: Run, params: Params) -> tuple[BatchLoader, TokenWindows]:
    """This rank's training batches, and the windows of the held-out split. Collective."""
    workdir = Path(run.spec.provenance.workdir)
    path = token_file(params.data, workdir=workdir, run_folder=run.folder.path, group=run.group)
    windows = TokenWindows(path, "train", seq_len=params.seq_len)
    _require_vocab(windows, params, run.spec)
    loader = BatchLoader(
        windows, global_batch=params.global_batch, rank=run.rank, world_size=run.world_size, seed=params.seed
    )
    return loader, TokenWindows(path, "validation", seq_len=params.seq_len)


def _require_vocab(windows: TokenWindows, params: Params, spec: RunSpec) -> None:
    if windows.vocab_size > params.vocab_size:
        what = f"is below the {windows.vocab_size} of {windows.path}"
        problem = Problem(
            file=spec.provenance.job_file,
            key="params.vocab_size",
            what=what,
            value=params.vocab_size,
            remedy=f"set vocab_size = {windows.vocab_size}",
        )
        raise ConfigError([problem])


def train_step(
    engine: TrainingEngine, windows: Tensor, rate: float, *, accumulate: int, mean_loss: bool
) -> tuple[Tensor, Tensor | float]:
    """One optimizer step. Collective.

    Args:
        windows: token ids of this rank's share of the batch, int64, on the run's device; `accumulate` divides them.
        mean_loss: average the loss over ranks; this rank's own otherwise.

    Returns:
        (mean loss in nats, norm of the gradient before clipping).
    """
    losses = [
        engine.forward_backward(micro[:, :-1], micro[:, 1:], is_last=index == accumulate - 1)
        for index, micro in enumerate(windows.chunk(accumulate))
    ]
    loss = torch.stack(losses).mean()
    with averaging_over_ranks(loss) if mean_loss else nullcontext():
        norm = engine.step(rate)
    return loss, norm
