"""A sweep on this machine: one task after another, or a few at once, each a run of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from launching import events, kill_quietly

from cfe_hpc.launch.local import is_alive
from cfe_hpc.ranks.jobrecords import records
from cfe_hpc.runfolder import RunFolder

# Task 1 fails until it is mended; those of a sweep that is to be cancelled stay.
PROGRAM = """
import os, sys, time
task = int(os.environ["CFE_SWEEP_TASK"])
print("x is", sys.argv[1], flush=True)
if sys.argv[1] == "stay":
    time.sleep(600)
sys.exit(task == 1 and not os.path.exists("mended"))
"""

Cfe = Callable[..., Any]


@pytest.fixture
def cfe(tmp_path: Path) -> Iterator[Cfe]:
    """cfe(*words, status=0): the JSON that the command line prints in tmp_path; what runs at the end is killed."""

    def run(*words: str, status: int = 0) -> Any:
        argv = [sys.executable, "-m", "cfe_hpc", *words, "--json"]
        done = subprocess.run(argv, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout)

    yield run
    for pattern in ("runs/*/*/control/job*", "runs/*/*/tasks/*/control/job*"):
        for record in tmp_path.glob(pattern):
            job = json.loads(record.read_text())
            if is_alive(job):
                kill_quietly(job["pid"])


def _submit(cfe: Cfe, folder: Path, *words: str, status: int = 0) -> RunFolder:
    job = {"name": "job", "command": [sys.executable, "-c", PROGRAM, "{params.x}"], "recovery": {"preflight": False}}
    (folder / "job.toml").write_text(tomli_w.dumps({**job, "resources": {"devices_per_node": 1}}))
    return RunFolder(Path(cfe("submit", "job.toml", *words, status=status)["run_dir"]))


def _wait(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def _states(cfe: Cfe, sweep: RunFolder) -> list[str]:
    return [row["state"] for row in cfe("status", sweep.run_id)]


def test_tasks_run_a_few_at_once_and_those_that_failed_are_run_again(cfe: Cfe, tmp_path: Path) -> None:
    words = ("--sweep", "params.x=a,b,c", "--max-parallel", "3", "--wait")
    sweep = _submit(cfe, tmp_path, *words, status=1)
    assert _states(cfe, sweep) == ["COMPLETED", "FAILED", "COMPLETED"]
    assert (sweep.result() or {})["tasks"] == {"FAILED": 1, "COMPLETED": 2}
    said = [path.read_text() for task in sweep.tasks() for path in task.logs.glob("*.0.out")]
    assert sorted(said) == ["x is a\n", "x is b\n", "x is c\n"]
    (tmp_path / "mended").touch()
    assert cfe("retry", sweep.run_id)["tasks"] == [1]
    assert _wait(sweep.result)["state"] == "COMPLETED"
    assert [event["attempt"] for event in events(sweep.task(1), "started")] == [0, 1]
    assert [len(records(task, "job")) for task in sweep.tasks()] == [1, 2, 1]


def test_a_cancelled_sweep_starts_no_further_task(cfe: Cfe, tmp_path: Path) -> None:
    sweep = _submit(cfe, tmp_path, "--sweep", "params.x=stay,a")
    _wait(lambda: events(sweep.task(0), "started"))
    assert _states(cfe, sweep) == ["RUNNING", "PENDING"]
    assert cfe("cancel", sweep.run_id)["tasks"] == 1
    assert _wait(sweep.result)["tasks"] == {"CANCELLED": 2}
    _wait(lambda: not any(is_alive(job) for job in records(sweep, "job")))
    assert [task.sweep_task for task in sweep.tasks()] == [0]
