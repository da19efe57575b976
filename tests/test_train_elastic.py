"""The training that ships at another world size, and in smaller passes: the same batches, the same losses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_train_main import PARAMS, StandIn
from train_ranks import gloo_group, on_ranks

from cfe_hpc.checkpoints.store import resume, save
from cfe_hpc.checkpoints.tracked import capture, restore
from cfe_hpc.data.build import build
from cfe_hpc.data.sources import stdlib_sources
from cfe_hpc.train import main

STEPS, PLANNED = 9, 2


class Part(StandIn):
    """Steps [first, last) of the training on real ranks, from the checkpoint of `first` to that of `last`."""

    def __init__(self, rank: int, world_size: int, folder: Path, first: int, last: int, divisor: int) -> None:
        super().__init__(folder, {**PARAMS, "global_batch": 8, "steps": STEPS})
        self.spec.plan = SimpleNamespace(world_size=PLANNED)
        self.rank, self.world_size, self.group = rank, world_size, gloo_group()
        self._root, self._first, self._last, self._divisor = folder / "checkpoints", first, last, divisor

    def micro_batch(self, wanted: int) -> int:
        return wanted // self._divisor

    def check_stop(self, *, updated: bool = True) -> None:
        pass

    def steps(self, total: int) -> Iterator[int]:
        load = partial(restore, objects=self.objects, group=self.group)
        opened = resume(self._root, load, run_id="r", attempt=self._first, group=self.group)
        assert (opened.step if opened else 0) == self._first
        for step in range(self._first, self._last):
            self.done = step
            yield step
        content = capture(self.objects, group=self.group)
        save(self._root, content, step=self._last, attempt=self._first, run_id="r", group=self.group)


def part(rank: int, world_size: int, *words: Any) -> tuple[list[tuple[float, float]], int]:
    """(loss and norm of each step; batches' first sample at the end) of a Part."""
    run = Part(rank, world_size, *words)
    main.run(run)
    figures = [(float(values["loss"]), float(values["grad_norm"])) for values in run.logged.values()]
    return figures, run.objects["data"].samples


@pytest.mark.slow
def test_losses_do_not_depend_on_the_ranks_that_there_are_or_on_their_memory(tmp_path: Path) -> None:
    curves = {}
    for name, parts in {
        "undisturbed": [(2, 0, 9, 1)],
        "elastic": [(2, 0, 3, 1), (1, 3, 6, 1), (2, 6, 9, 2)],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        build(folder / "tokens.h5", stdlib_sources()[:20])
        curves[name] = []
        for world_size, first, last, divisor in parts:
            answers = on_ranks(world_size, part, world_size, folder, first, last, divisor)
            assert {samples for _, samples in answers} == {8 * last}
            curves[name] += answers[0][0]
    assert len(curves["elastic"]) == STEPS
    for (loss, norm), (expected_loss, expected_norm) in zip(curves["elastic"], curves["undisturbed"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
