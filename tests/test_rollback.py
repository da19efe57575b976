"""A loss that is not finite takes a run back to before it, without the data that it came of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from spine.harness import SMALL, LiveRun, cfe, site_file, write_job

from cfe_hpc.data.build import build
from cfe_hpc.data.sources import stdlib_sources

STEPS = 12
BATCH = 2

Submit = Callable[..., LiveRun]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """Submit the summing job on the local site, with changes; it is cancelled when the test is over."""
    runs: list[LiveRun] = []

    def summing(folder: Path = tmp_path, *, ranks: int = 1, site: str = "local", **tables: Any) -> LiveRun:
        job = {"name": "sum", "entry": "entries_nan:summing", "resources": {"devices_per_node": ranks}, **tables}
        run = LiveRun.submit(write_job(folder, **job), site, cwd=folder, env=os.environ)
        runs.append(run)
        return run

    yield summing
    for run in runs:
        if run.folder.result() is None:
            cfe("cancel", run.run_id, cwd=run.cwd, env=run.env)


def total_without(*batches: int) -> int:
    """The sum of a run that never saw the batches of these numbers."""
    return sum([number for number in range(100) if number // BATCH not in batches][: STEPS * BATCH])


def completed(run: LiveRun) -> dict[str, Any]:
    result = run.wait_result()
    assert result["state"] == "COMPLETED", run.diagnosis()
    return result


def test_a_window_that_gives_a_nan_is_left_out(submit: Submit) -> None:
    run = submit(params={"steps": STEPS, "poisoned": [14]}, checkpoint={"every_steps": 4})
    result = completed(run)
    assert (result["metrics"]["total"], result["attempts"]) == (total_without(7), 1)
    (event,) = run.events("rolled_back")
    told = {"bad_step": 8, "value": "loss is nan", "samples": [14, 16], "lr_scale": 1.0, "undone": 4}
    assert (event["step"], event["reason"], event["detail"]) == (4, "nan", told)
    # The state after step 8 was looked at before it was to be saved.
    assert [event["step"] for event in run.events("checkpoint_saved")] == [4, 8, 12]
    assert run.events("checkpoint_failed") == []


@pytest.mark.parametrize("checkpoint", [{}, {"async": True, "local": True}], ids=["shared", "nodes"])
def test_a_checkpoint_that_was_spoilt_before_it_showed_is_taken_out(
    submit: Submit, tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    params = {"steps": STEPS, "poisoned": [14], "late": True, "pause_s": 0.15 if checkpoint else 0.0}
    site = site_file(tmp_path, "local", storage={"node_local": str(tmp_path / "node")})
    run = submit(site=site, params=params, checkpoint={"every_steps": 4, **checkpoint})
    result = completed(run)
    assert result["metrics"]["total"] == total_without(7, 8, 9), run.diagnosis()
    assert [event["step"] for event in run.events("rolled_back")] == [8, 4]
    assert [event["detail"]["samples"] for event in run.events("rolled_back")] == [[16, 18], [14, 20]]
    (out,) = run.events("checkpoint_failed")
    assert (out["step"], out["reason"]) == (8, "nan")
    done = cfe("checkpoints", "verify", str(run.folder.path), cwd=run.cwd, env=run.env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_when_no_roll_back_is_left_the_run_is_held(submit: Submit) -> None:
    run = submit(params={"steps": STEPS, "poisoned": [10, 20]}, checkpoint={"every_steps": 2}, recovery={"nans": 1})
    result = run.wait_result()
    assert result["state"] == "HELD", run.diagnosis()
    assert "loss is nan at step 10: " in result["reason"] and "the job allows 1 (recovery.nans)" in result["reason"]
    assert len(run.events("rolled_back")) == 1
    (held,) = run.events("held")
    assert (held["reason"], held["cause"]) == (result["reason"], "nan")
    assert run.events()[-1] == held  # nothing after it: that would count against whoever goes on


def test_before_the_first_checkpoint_the_run_starts_over(submit: Submit) -> None:
    run = submit(
        params={"steps": STEPS, "poisoned": [4]}, checkpoint={"every_steps": 8}, recovery={"nan_lr_factor": 0.5}
    )
    result = completed(run)
    assert (result["metrics"]["total"], result["attempts"]) == (total_without(2), 2)
    assert result["metrics"]["rate"] == 0.5
    assert [event["step"] for event in run.events("rolled_back")] == [0]
    assert [event["reason"] for event in run.events("requeued")] == ["nan"]


def test_what_was_left_out_stays_out_in_the_next_attempt(submit: Submit) -> None:
    """The checkpoint that it resumes from is older than the roll-back."""
    params = {"steps": STEPS, "poisoned": [14], "crash": True}
    run = submit(params=params, checkpoint={"every_steps": 4}, recovery={"failures": 1})
    result = completed(run)
    assert (result["metrics"]["total"], result["attempts"]) == (total_without(7), 2)
    assert len(run.events("rolled_back")) == 1


def test_a_state_that_is_not_finite_is_not_saved_at_a_stop(submit: Submit) -> None:
    """Nobody looks before: values are logged too seldom."""
    params = {"steps": STEPS, "poisoned": [10], "stop_step": 6, "pause_s": 0.1}
    run = submit(params=params, metrics={"every_steps": 100}, checkpoint={"every_steps": 4})
    result = completed(run)
    assert (result["metrics"]["total"], result["attempts"]) == (total_without(5), 2)
    (failed,) = run.events("checkpoint_failed")
    assert (failed["attempt"], failed["reason"]) == (0, "nan") and "loss is nan" in failed["detail"]
    assert [event["step"] for event in run.events("resumed")] == [4]
    assert [event["step"] for event in run.events("rolled_back")] == [4]


ENGINES = {"torch": ("torch", 0), "zero1": ("deepspeed", 1), "zero2": ("deepspeed", 2), "zero3": ("deepspeed", 3)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES if os.environ.get("CFE_TEST_FULL") == "1" else ["torch"])
def test_training_goes_on_as_if_the_window_had_never_been(submit: Submit, tmp_path: Path, engine: str) -> None:
    kind, zero_stage = ENGINES[engine]
    build(tmp_path / "tokens.h5", stdlib_sources()[:40])
    runs = {}
    for name, said in {"poisoned": {"poisoned": 81}, "skipped": {"skipped": [80, 88]}}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "windows.json").write_text(json.dumps(said))
        runs[name] = submit(
            folder,
            ranks=2,
            entry="entries_nan:training",
            engine={"kind": kind, "zero_stage": zero_stage},
            checkpoint={"every_steps": 4, "async": True, "overlap": True},
            params={**SMALL, "steps": 16, "data": "../tokens.h5"},
        )
    results = {name: completed(run) for name, run in runs.items()}
    (event,) = runs["poisoned"].events("rolled_back")
    assert (event["detail"]["bad_step"], event["detail"]["samples"]) == (11, [80, 88])
    assert event["step"] in (4, 8, 9, 10)  # a save that is still being written makes the next one late
    assert results["poisoned"]["weights_sha256"] == results["skipped"]["weights_sha256"]
    assert results["poisoned"]["metrics"]["val_loss"] == results["skipped"]["metrics"]["val_loss"]
