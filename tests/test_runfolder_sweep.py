"""Folders of sweeps and their tasks, told from paths and from what lies in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfe_hpc.runfolder import RUN_ID, RunFolder


def _sweep(tmp_path: Path) -> RunFolder:
    sweep = RunFolder.create(tmp_path, "lr")
    sweep.sweep_json.write_text("{}")
    return sweep


def test_a_run_is_no_sweep_and_no_task(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "lr")
    assert RUN_ID.match(run.run_id)
    assert (run.is_sweep, run.sweep_task, run.sweep, run.tasks(), run.top) == (False, None, None, [], run)


def test_a_task_knows_its_sweep_and_its_number(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    task = sweep.task(12)
    assert (sweep.is_sweep, sweep.sweep_task, sweep.tasks()) == (True, None, [])
    assert (task.run_id, task.sweep_task, task.is_sweep) == (f"{sweep.run_id}.000012", 12, False)
    assert task.sweep is not None and task.sweep.path == sweep.path == task.top.path


def test_tasks_are_those_that_have_started_by_number(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    for number in (10, 2, 999_999):
        sweep.task(number).path.mkdir(parents=True)
    (sweep.path / "tasks" / "notes").mkdir()
    assert [task.sweep_task for task in sweep.tasks()] == [2, 10, 999_999]


@pytest.mark.parametrize("path", ["tasks/000012", "lr/tasks/000012", "lr-20260131-235959-0a1b/tasks/12"])
def test_other_folders_are_no_tasks(path: str) -> None:
    run = RunFolder(Path("/runs") / path)
    assert (run.sweep_task, run.run_id) == (None, Path(path).name)
