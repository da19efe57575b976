"""The entry of a sweep's tasks: a count, of which some go wrong until they are mended."""

from __future__ import annotations

import time
from typing import Any


class Count:
    """The smallest thing that has a state."""

    def __init__(self) -> None:
        self.total = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def sweeping(run: Any) -> None:
    """Sum the step numbers; tasks of `params.failing` raise in step 5 until the sweep's folder has a file `mended`,
    and those of `params.slow` take their time."""
    task, count = run.params["task"], Count()
    run.track(count=count)
    for step in run.steps(run.params["steps"]):
        if task in run.params["failing"] and step == 5 and not (run.folder.top.path / "mended").exists():
            raise ArithmeticError(f"task {task} went wrong")
        count.total += step
        run.log(total=count.total, val_loss=float(abs(task - 4)))
        time.sleep(0.4 if task in run.params["slow"] else 0.02)
