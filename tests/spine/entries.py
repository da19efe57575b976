"""Entries for whole-run tests: the shipped training, slowed down so that a test can hit the step it wants to, and a
count that needs no torch."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any


def paced(run: Any) -> None:
    """`cfe_hpc.train.main:run` with a pause in each step, as long as the run folder's file `pace` says.

    The pause changes nothing that is computed: an undisturbed run without it must end with the same weights.
    """
    pace: Path = run.folder.path / "pace"
    steps = run.steps

    def slowly(total: int) -> Any:
        for step in steps(total):
            yield step
            try:
                time.sleep(float(pace.read_text()))
            except (FileNotFoundError, ValueError):
                continue

    run.steps = slowly
    # Here, for the other entries need no torch.
    from cfe_hpc.train.main import run as train

    train(run)


class Count:
    """The smallest thing that has a state: a number that each step adds to."""

    def __init__(self) -> None:
        self.total = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def counting(run: Any) -> None:
    """Sum the step numbers, with a pause in each; the end's total tells whether any was skipped or repeated."""
    count = Count()
    run.track(count=count)
    run.expect(variant=run.params["variant"])
    for step in run.steps(run.params["steps"]):
        count.total += step
        run.log(loss=1.0 / (step + 1), val_loss=float(abs(step - 12)), total=count.total)
        time.sleep(run.params["pause_s"])


def crashing(run: Any) -> None:
    """`counting`, but the rank that params name raises in the step they name, as long as the file `crash` is there."""
    flag = run.folder.path / "crash"
    steps = run.steps

    def until(total: int) -> Any:
        for step in steps(total):
            if step == run.params["crash_step"] and run.rank == run.params["crash_rank"] and flag.exists():
                raise ArithmeticError(f"step {step} went wrong")
            yield step

    run.steps = until
    counting(run)


def evaluating(run: Any) -> None:
    """`paced`, with the pause `eval_pace` says before each batch of an evaluation, and a line in `evaluated` for it."""
    pace: Path = run.folder.path / "eval_pace"
    check_stop = run.check_stop

    def slowly(**words: Any) -> None:
        if run.rank == 0:
            with open(run.folder.path / "evaluated", "a", encoding="utf-8") as seen:
                seen.write(f"{run.attempt} {run.folder.path.name}\n")
        with contextlib.suppress(FileNotFoundError, ValueError):
            time.sleep(float(pace.read_text()))
        check_stop(**words)

    run.check_stop = slowly
    paced(run)


def epochs(run: Any) -> None:
    """A model of one number, the steps that were done; an epoch ends after each `epoch_steps` of them."""
    import torch

    model = torch.nn.Module()
    model.step = torch.nn.Parameter(torch.zeros(()))
    run.track(model=model)
    for step in run.steps(run.params["steps"]):
        with torch.no_grad():
            model.step.fill_(step + 1)
        if (step + 1) % run.params["epoch_steps"] == 0:
            run.end_epoch(step // run.params["epoch_steps"])
        run.log(loss=1.0)


class Bulk:
    """A state of many bytes, each of them the step's."""

    def __init__(self, size_bytes: int) -> None:
        # Here, for `counting` needs no numpy.
        import numpy

        self.values = numpy.zeros(size_bytes, dtype=numpy.uint8)
        self.total = 0

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values[:] = state["values"]
        self.total = state["total"]


def bulky(run: Any) -> None:
    """`counting` with a state of `params.state_bytes`; a byte that is not the step's ends the run."""
    bulk = Bulk(run.params["state_bytes"])
    run.track(bulk=bulk)
    for step in run.steps(run.params["steps"]):
        assert (bulk.values == step % 251).all(), f"step {step}: wrong bytes were loaded"
        bulk.values.fill((step + 1) % 251)
        bulk.total += step
        run.log(total=bulk.total)
        time.sleep(run.params["pause_s"])
