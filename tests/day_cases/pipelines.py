"""Pipelines in Slurm's hands alone: through requeues and successors, and after a failure."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import tomli_w
from spine.harness import LiveRun, site_file, write_job
from spine.stage import Stage

from cfe_hpc.launch.jobs import all_jobs, latest_job

# Ends on the first signal, and at once in every attempt but the first.
UNTIL_TOLD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
print("up", flush=True)
time.sleep(0 if attempt else 600)
"""

FAILS_ONCE = "import os, sys; sys.exit(int(os.environ['CFE_ATTEMPT_BASE'] == '0'))"


def submit(stage: Stage, partition: str, *stages: dict[str, Any], words: tuple[str, ...] = ()) -> list[LiveRun]:
    """Submit a pipeline; its runs, in order."""
    resources = {"devices_per_node": 1, "cpus_per_device": 8, "time": "10m", "partition": partition}
    tables = {"name": "line", "command": ["true"], "resources": resources, "stage": list(stages)}
    job = write_job(stage.folder, **tables)
    job.write_text(tomli_w.dumps(tables), encoding="utf-8")
    site = site_file(stage.folder)
    document = json.loads(stage.cfe("submit", str(job), "--site", site, *words, "--json").stdout)
    assert document["run_id"] == document["stages"][-1]["run_id"]
    return [LiveRun(row, stage.folder, stage.cluster.env) for row in document["stages"]]


def completed(run: LiveRun) -> None:
    assert run.wait_result(120)["state"] == "COMPLETED", run.diagnosis()


def a_chain_survives_a_requeue_and_hands_its_files_on(stage: Stage) -> None:
    first, second, third = submit(
        stage,
        "gpu",
        {"name": "data", "command": [sys.executable, "-c", UNTIL_TOLD]},
        {"name": "train", "command": ["cp", "-r", "{stage.data.run_dir}/logs", "{stage.data.run_dir}/copy"]},
        {"name": "evaluate", "after": ["data", "train"], "command": ["ls", "{stage.data.run_dir}/copy"]},
    )
    first.wait(lambda: "up" in first.log("out"), 60, "up")
    assert stage.status(second)["state"] == "PENDING"
    assert stage.status(third)["reason"] == f"waits for {first.run_id}, {second.run_id}"
    stage.cfe("requeue", first.run_id)
    stage.requeued(first, 1)
    for run in (first, second, third):
        completed(run)
    assert len(all_jobs(second.folder)) == len(all_jobs(third.folder)) == 1
    assert f"{first.job_id}.1.0.out" in third.log("out")


def a_chain_goes_on_behind_a_successor(stage: Stage) -> None:
    first, second = submit(
        stage, "spot-cancel", {"name": "data", "command": [sys.executable, "-c", UNTIL_TOLD]}, {"name": "train"}
    )
    first.wait(lambda: "up" in first.log("out"), 60, "up")
    preemptor = stage.cluster.preempt(first.job_id)
    successor = first.wait(lambda: first.folder.promised("job-1"), 60, "followed by a successor")["job_id"]
    stage.cluster.wait_for_end(first.job_id)
    assert f"afterok:{successor}(" in stage.cluster.job(second.job_id)["Dependency"]
    assert stage.status(second)["state"] == "PENDING"
    stage.cluster.scancel(preemptor)
    completed(first)
    completed(second)
    began, ended = second.events("started")[0]["time"], first.events("completed")[0]["time"]
    assert ended <= began


def a_failure_stops_what_follows_and_a_requeue_brings_it_back(stage: Stage) -> None:
    first, second, third = submit(
        stage, "gpu", {"name": "data", "command": [sys.executable, "-c", FAILS_ONCE]}, {"name": "b"}, {"name": "c"}
    )
    assert first.wait_result(60)["state"] == "FAILED"
    for run in (second, third):
        assert stage.cluster.wait_for_end(run.job_id) == "CANCELLED"
        told = stage.status(run)
        assert (told["state"], told["attempt"]) == ("CANCELLED", None)
        assert told["reason"].startswith(f"never started: {first.run_id} ended FAILED: ")
    refused = stage.cfe("requeue", third.run_id, status=2).stderr
    assert f"{second.run_id}: never started: {first.run_id} ended FAILED" in refused
    outcome = json.loads(stage.cfe("requeue", first.run_id, "--json").stdout)
    assert outcome["followers"] == [second.run_id, third.run_id]
    for run in (first, second, third):
        completed(run)
    assert [len(all_jobs(run.folder)) for run in (first, second, third)] == [2, 2, 2]


def cancelling_a_stage_cancels_what_follows(stage: Stage) -> None:
    first, second = submit(
        stage, "gpu", {"name": "data", "command": [sys.executable, "-c", UNTIL_TOLD]}, {"name": "train"}
    )
    third = stage.submit("gpu", command=["true"], words=("--after", first.run_id, "--after", second.job_id))
    dependency = stage.cluster.job(third.job_id)["Dependency"]
    assert f"afterok:{first.job_id}(" in dependency and f"afterok:{second.job_id}(" in dependency
    first.wait(lambda: first.events("started"), 60, "started")
    stage.cfe("cancel", first.run_id)
    for run in (second, third):
        assert stage.cluster.wait_for_end(run.job_id) == "CANCELLED"
        assert stage.status(run)["reason"].startswith(f"never started: {first.run_id} ended CANCELLED: cancel")
    assert (latest_job(third.folder) or {})["job_id"] == third.job_id


# One task fails until there is a file.
UNTIL_MENDED = "import os, sys; sys.exit(sys.argv[1] == '1' and not os.path.exists('mended'))"


def a_sweep_in_a_chain_lets_it_go_on_when_its_last_task_is_mended(stage: Stage) -> None:
    program = [sys.executable, "-c", UNTIL_MENDED, "{params.x}"]
    sweep = {"name": "sweep", "command": program, "params": {"x": 0}, "sweep": {"axes": {"params.x": [0, 1, 2]}}}
    first, second, third = submit(
        stage, "gpu", sweep, {"name": "best", "command": ["ls", "{stage.sweep.run_dir}"]}, {"name": "end"}
    )
    assert stage.status(second)["reason"] == f"waits for {first.run_id}"
    assert stage.cluster.wait_for_end(second.job_id) == stage.cluster.wait_for_end(third.job_id) == "CANCELLED"
    assert stage.status(third)["reason"].startswith(f"never started: {first.run_id} ended FAILED: tasks: 1 FAILED")
    (stage.folder / "mended").touch()
    retried = json.loads(stage.cfe("retry", first.run_id, "--failed", "--json").stdout)
    assert (retried["tasks"], retried["followers"]) == ([1], [second.run_id, third.run_id])
    for run in (first, second, third):
        completed(run)
    assert "sweep.json" in second.log("out")


def what_follows_a_sweep_waits_for_the_successor_of_a_task(stage: Stage) -> None:
    program = [sys.executable, "-c", UNTIL_TOLD]
    sweep = {"name": "sweep", "command": program, "params": {"x": 0}, "sweep": {"axes": {"params.x": [0, 1]}}}
    first, second = submit(stage, "spot-cancel", sweep, {"name": "end"})
    tasks = [first.folder.task(number) for number in (0, 1)]
    first.wait(lambda: all(list(task.logs.glob("*.0.0.out")) for task in tasks), 90, "up")
    array = first.job_id
    assert f"afterok:{array}_0(unfulfilled)" in stage.cluster.job(second.job_id)["Dependency"]
    preemptor = stage.cluster.preempt(f"{array}_0")
    successor = first.wait(lambda: tasks[0].promised("job-1"), 60, "followed by a successor")["job_id"]
    dependency = stage.cluster.job(second.job_id)["Dependency"]
    assert f"afterok:{successor}(unfulfilled)" in dependency and f"{array}_0" not in dependency
    stage.cluster.scancel(preemptor)
    stage.cfe("requeue", f"{first.run_id}.000001")
    stage.cluster.wait_for_restart(f"{array}_1", 1)
    stage.cluster.resume(f"{array}_1")
    completed(second)


CASES = [
    a_sweep_in_a_chain_lets_it_go_on_when_its_last_task_is_mended,
    a_chain_goes_on_behind_a_successor,
    a_chain_survives_a_requeue_and_hands_its_files_on,
    a_failure_stops_what_follows_and_a_requeue_brings_it_back,
    cancelling_a_stage_cancels_what_follows,
]
if os.environ.get("CFE_TEST_FULL"):
    CASES.append(what_follows_a_sweep_waits_for_the_successor_of_a_task)
