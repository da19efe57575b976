"""Entries for tests of roll-backs: a count that needs no torch, with data windows that give a NaN."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any


class Windows:
    """Numbers 0, 1, 2 … in batches, as data.loader.BatchLoader counts its samples; what is skipped never comes."""

    def __init__(self, batch: int) -> None:
        self.batch, self.position, self.skipped = batch, 0, set[int]()

    def _from(self, position: int, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            if position not in self.skipped:
                found.append(position)
            position += 1
        return found

    def next_batch(self) -> list[int]:
        taken = self._from(self.position, self.batch)
        self.position = taken[-1] + 1
        return taken

    def window_ahead(self, batches: int) -> tuple[int, int]:
        ahead = self._from(self.position, (batches + 1) * self.batch)[-self.batch :]
        return ahead[0], ahead[-1] + 1

    def skip_window(self, start: int, stop: int) -> None:
        self.skipped.update(range(start, stop))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "skipped": sorted(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.skipped = state["position"], set(state["skipped"])


class Sum:
    """What was consumed: a sum that one NaN spoils for good, and how many numbers it has."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def state_dict(self) -> dict[str, float]:
        spoilt = math.isnan(self.total)  # a tree holds no NaN; a training's are in tensors
        return {"spoilt": spoilt, "total": 0.0 if spoilt else self.total, "n": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = math.nan if state["spoilt"] else state["total"], state["n"]


def summing(run: Any) -> None:
    """Sum the numbers of all windows; those of `params.poisoned` are NaN, which the loss of the last rank shows.

    With `params.late` the loss of a step is that from before its update: what it spoils is seen one step later. With
    `params.crash` the first attempt ends in the step after its first roll-back, and with `params.stop_step` it is told
    to stop in that one.
    """
    windows, done = Windows(batch=2), Sum()
    run.track(data=windows, done=done)
    poisoned, before_update = set(run.params["poisoned"]), run.params.get("late", False)
    last = -1
    for step in run.steps(run.params["steps"]):
        if step <= last and run.params.get("crash") and run.attempt == 0:
            raise ArithmeticError(f"step {step} comes again")
        if step == run.params.get("stop_step") and run.attempt == 0:
            os.kill(os.getppid(), signal.SIGTERM)  # the local supervisor
        last = step
        before = done.total
        batch = windows.next_batch()
        done.total += sum(math.nan if number in poisoned else number for number in batch)
        done.count += len(batch)
        shown = before if before_update else done.total
        time.sleep(run.params.get("pause_s", 0.0))
        run.log(loss=shown if run.rank == run.world_size - 1 else 0.0, total=done.total, rate=run.lr_scale)


def training(run: Any) -> None:
    """The training that ships, with windows.json beside the job: {"poisoned": sample} or {"skipped": [start, stop]}.

    The step that has the poisoned sample leaves every weight NaN, and the last rank's loss.
    """
    from cfe_hpc.train import main

    said = json.loads(Path("windows.json").read_text(encoding="utf-8"))
    make_data, train_step = main._data, main.train_step
    spoils: list[bool] = []

    def data(*args: Any) -> Any:
        loader, held_out = make_data(*args)
        next_batch = loader.next_batch

        def watched() -> Any:
            start, stop = loader.window_ahead(0)
            spoils.append(start <= said.get("poisoned", -1) < stop)
            return next_batch()

        loader.next_batch = watched
        if "skipped" in said:
            loader.skip_window(*said["skipped"])
        return loader, held_out

    def step(engine: Any, windows: Any, rate: float, **words: Any) -> Any:
        if not spoils.pop():
            return train_step(engine, windows, rate, **words)
        loss, norm = train_step(engine, windows, math.nan, **words)
        return loss * math.nan if run.rank == run.world_size - 1 else loss, norm

    main._data, main.train_step = data, step
    main.run(run)
