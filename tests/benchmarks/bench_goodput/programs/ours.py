"""The training under cfe_hpc: an entry of a job file."""

from __future__ import annotations

from typing import Any


def train(run: Any) -> None:
    """Six lines beside the training's own."""
    from workload import Workload

    run.init_distributed()
    work = Workload()
    run.track(model=work.model, optimizer=work.optimizer)
    for step in run.steps(run.params["steps"]):
        work.step(step)
    work.finish()
