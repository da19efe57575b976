"""Sweeps: arrays, tasks that fail or are preempted, and what goes on with them."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from spine.harness import cfe, site_file, write_job
from spine.stage import Stage

from cfe_hpc.ranks.jobrecords import records
from cfe_hpc.runfolder import RunFolder

WHOLE_NODE = {"nodes": 1, "devices_per_node": 1, "cpus_per_device": 8, "time": "20m"}
STEPS = 20


def _submit(stage: Stage, partition: str, *words: str, **tables: Any) -> tuple[RunFolder, list[str]]:
    """(the sweep's folder, its arrays' job ids)."""
    job = write_job(stage.folder, name="sweep", resources={**WHOLE_NODE, "partition": partition}, **tables)
    site = site_file(stage.folder, slurm={"array_max": 5})
    done = cfe("submit", str(job), "--site", site, "--json", *words, cwd=stage.folder, env=stage.cluster.env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    sweep = RunFolder(stage.folder / told["run_dir"])
    assert (told["sweep_id"], told["job_id"]) == (sweep.run_id, told["job_ids"][0])
    return sweep, told["job_ids"]


def _wait_result(sweep: RunFolder, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while (result := sweep.result()) is None:
        assert time.monotonic() < deadline, _diagnosis(sweep)
        time.sleep(0.2)
    return result


def _diagnosis(sweep: RunFolder) -> str:
    texts = [f"{task.run_id}: {task.result()}\n{_logs(task)}" for task in sweep.tasks()]
    return "\n".join([f"{sweep.run_id}: not ended", *texts])


def _logs(task: RunFolder) -> str:
    return "\n".join(path.read_text(errors="replace")[-600:] for path in sorted(task.logs.glob("*.err")))


def _events(task: RunFolder, name: str) -> list[dict[str, Any]]:
    return [event for event in task.events() if event["event"] == name]


def retry_sends_exactly_the_two_that_failed(stage: Stage) -> None:
    """Twelve tasks in three arrays: two fail, one is preempted and goes on by itself."""
    params = {"steps": STEPS, "failing": [3, 7], "slow": [0]}
    sweep, arrays = _submit(
        stage,
        "spot",
        *("--sweep", "params.task={range=[0,12]}", "--max-parallel", "4"),
        entry="entries_sweep:sweeping",
        params=params,
        checkpoint={"every_steps": 3, "keep_best": "val_loss:min"},
        recovery={"preflight": False},
    )
    assert len(arrays) == 3
    first = sweep.task(0)
    deadline = time.monotonic() + 90
    while not any(beat["step"] >= 2 for beat in first.heartbeats()):
        assert time.monotonic() < deadline, _diagnosis(sweep)
        time.sleep(0.1)
    stage.cluster.preempt_once(f"{arrays[0]}_0")

    assert _wait_result(sweep, 150)["tasks"] == {"FAILED": 2, "COMPLETED": 10}, _diagnosis(sweep)
    assert [event["reason"] for event in _events(first, "requeued")] == ["preempted"]
    assert (first.result() or {})["attempts"] == 2
    rows = json.loads(stage.cfe("status", sweep.run_id, "--json").stdout)
    assert {row["task"]: row["state"] for row in rows if row["state"] != "COMPLETED"} == {3: "FAILED", 7: "FAILED"}
    assert [row["task"] for row in rows if row["best"]] == [4]
    assert rows[11]["values"] == {"params.task": 11}

    (sweep.path / "mended").touch()
    shown = json.loads(stage.cfe("retry", sweep.run_id, "--failed", "--dry-run", "--json").stdout)
    assert (shown["tasks"], shown["job_ids"]) == ([3, 7], [])
    again = json.loads(stage.cfe("retry", sweep.run_id, "--failed", "--json").stdout)
    assert again["tasks"] == [3, 7]
    sent = stage.cluster.squeue("--states=all", "-r", f"--jobs={','.join(again['job_ids'])}", "-o", "%i").split()
    assert sorted(sent) == sorted([f"{again['job_ids'][0]}_3", f"{again['job_ids'][1]}_2"])
    assert _wait_result(sweep, 90)["state"] == "COMPLETED", _diagnosis(sweep)
    attempts = {task.sweep_task: (task.result() or {})["attempts"] for task in sweep.tasks()}
    assert {task: number for task, number in attempts.items() if number != 1} == {0: 2, 3: 2, 7: 2}
    for number in (3, 7):
        task = sweep.task(number)
        assert [event["step"] for event in _events(task, "resumed")] == [3], _logs(task)
        assert (task.result() or {})["metrics"]["total"] == sum(range(STEPS))
    assert "no task" in stage.cfe("retry", sweep.run_id).stdout


# Ends on the first signal, and at once in every attempt but the first.
UNTIL_TOLD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
print("up", os.environ["CFE_SWEEP_TASK"], flush=True)
time.sleep(0 if attempt else 600)
"""


def _up(sweep: RunFolder, number: int) -> None:
    """Wait until a task's program runs."""
    deadline = time.monotonic() + 60
    logs = sweep.task(number).logs
    while not any(f"up {number}" in path.read_text() for path in logs.glob("*.0.out")):
        assert time.monotonic() < deadline, _diagnosis(sweep)
        time.sleep(0.1)


def cancel_ends_all_tasks_and_retry_brings_them_back(stage: Stage) -> None:
    sweep, [array] = _submit(
        stage,
        "gpu",
        *("--sweep", "params.x=1,2,3", "--max-parallel", "1"),
        command=[sys.executable, "-c", UNTIL_TOLD],
        params={"x": 0},
    )
    _up(sweep, 0)
    assert [row["state"] for row in _rows(stage, sweep)] == ["RUNNING", "PENDING", "PENDING"]
    assert stage.cfe("status", f"{array}_0", "--json").stdout.count(f"{sweep.run_id}.000000") == 1
    stage.cfe("cancel", sweep.run_id)
    assert _wait_result(sweep, 60)["tasks"] == {"CANCELLED": 3}, _diagnosis(sweep)
    assert [task.sweep_task for task in sweep.tasks()] == [0]
    assert json.loads(stage.cfe("retry", sweep.run_id, "--json").stdout)["tasks"] == []
    assert json.loads(stage.cfe("retry", sweep.run_id, "--cancelled", "--json").stdout)["tasks"] == [0, 1, 2]
    _up(sweep, 1)  # task 0 has had an attempt, and ends at once
    told = json.loads(stage.cfe("requeue", sweep.run_id, "--json").stdout)
    assert told["signalled"] == [1]
    stage.cfe("cancel", sweep.run_id)
    assert _wait_result(sweep, 60)["tasks"] == {"CANCELLED": 2, "COMPLETED": 1}, _diagnosis(sweep)


def _rows(stage: Stage, sweep: RunFolder) -> list[dict[str, Any]]:
    return list(json.loads(stage.cfe("status", sweep.run_id, "--json").stdout))


def a_task_whose_partition_cancels_goes_on_in_a_successor(stage: Stage) -> None:
    sweep, [array] = _submit(
        stage,
        "spot-cancel",
        *("--sweep", "params.x=1,2"),
        command=[sys.executable, "-c", UNTIL_TOLD],
        params={"x": 0},
    )
    _up(sweep, 0), _up(sweep, 1)
    preemptor = stage.cluster.preempt(f"{array}_1")
    deadline = time.monotonic() + 90
    while len(records(sweep.task(1), "job")) < 2:
        assert time.monotonic() < deadline, _diagnosis(sweep)
        time.sleep(0.2)
    stage.cluster.scancel(preemptor)
    assert _until(sweep.task(1), 90)["state"] == "COMPLETED", _diagnosis(sweep)
    assert [event["reason"] for event in _events(sweep.task(1), "requeued")] == ["preempted"]
    stage.cfe("requeue", f"{sweep.run_id}.0")
    stage.cluster.wait_for_restart(f"{array}_0", 1)
    stage.cluster.resume(f"{array}_0")
    assert _until(sweep.task(0), 150)["state"] == "COMPLETED", _diagnosis(sweep)
    assert (sweep.result() or {})["state"] == "COMPLETED"


def _until(task: RunFolder, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while (result := task.result()) is None:
        assert time.monotonic() < deadline, _logs(task)
        time.sleep(0.2)
    return result


CASES = [retry_sends_exactly_the_two_that_failed, cancel_ends_all_tasks_and_retry_brings_them_back]
if os.environ.get("CFE_TEST_FULL"):
    CASES.append(a_task_whose_partition_cancels_goes_on_in_a_successor)
