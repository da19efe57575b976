"""A loss that is not finite takes a run back to before it, without the data that it came of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from spine.harness import LiveRun, cfe, write_job

STEPS = 12
BATCH = 2

Submit = Callable[..., LiveRun]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """Submit the summing job on the local site, with changes; it is cancelled when the test is over."""
    runs: list[LiveRun] = []

    def summing(ranks: int = 1, **tables: Any) -> LiveRun:
        params = {"steps": STEPS, "poisoned": [], **tables.pop("params", {})}
        job = {"name": "sum", "entry": "entries_nan:summing", "resources": {"devices_per_node": ranks}, **tables}
        path = write_job(tmp_path, **job, params=params)
        run = LiveRun.submit(path, "local", cwd=tmp_path, env=os.environ)
        runs.append(run)
        return run

    yield summing
    for run in runs:
        if run.folder.result() is None:
            cfe("cancel", run.run_id, cwd=run.cwd, env=run.env)


def numbers_without(*skipped: int) -> list[int]:
    """What a run of `STEPS` steps sums up that never saw the batches of these numbers."""
    every = [number for number in range(100) if number // BATCH not in skipped]
    return every[: STEPS * BATCH]


def test_a_window_that_gives_a_nan_is_left_out(submit: Submit) -> None:
    run = submit(params={"poisoned": [14]}, checkpoint={"every_steps": 4})
    result = run.wait_result()
    assert result["state"] == "COMPLETED", run.diagnosis()
    assert result["metrics"]["total"] == sum(numbers_without(7))
    (event,) = run.events("rolled_back")
    assert event["step"] == 4
    assert event["detail"] == {
        "bad_step": 8, "value": "loss is nan", "samples": [14, 16], "lr_scale": 1.0, "undone": 4
    }  # fmt: skip
    assert [event["step"] for event in run.events("checkpoint_saved")] == [4, 8, 12]
