"""Launchers between srun and the ranks, and attempts on fewer nodes than the job would like."""

from __future__ import annotations

import os
import signal
import sys
import time

from spine.harness import site_file
from spine.stage import STEPS, Stage, agent_pids, assert_counted, reasons

FOUR_RANKS = {"nodes": 2, "devices_per_node": 2, "cpus_per_device": 4, "time": "20m", "partition": "spot"}


def a_signal_to_the_wrappers_pid_alone_saves_all_ranks(stage: Stage) -> None:
    run = stage.submit("spot", resources=FOUR_RANKS, launch={"launcher": "torchrun"})
    run.wait_step(3, attempt=0)
    # What proctrack/cgroup does: nobody but slurmstepd's direct children hears of it; here only one of them.
    os.kill(agent_pids(run)[1], signal.SIGUSR2)
    stage.requeued(run, 1)
    run.wait_step(run.step() + 2, attempt=1)
    # And here every process of the job is told, launchers too.
    stage.cluster.preempt_once(run.job_id)
    assert_counted(run, attempts=3)
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert reasons(run) == ["requeue_requested", "preempted"]
    assert [event["detail"]["world_size"] for event in run.events("started")] == [4, 4, 4]
    assert not list(run.folder.control.glob("exit-*"))
    assert run.events("failed") == []


def _wait_until_empty(stage: Stage, nodes: list[str], timeout_s: float = 120.0) -> None:
    """Wait until no job is on the nodes any more, and none of them is still cleaning up after one."""
    deadline = time.monotonic() + timeout_s
    names = ",".join(nodes)
    while stage.cluster.run("squeue", "-h", "-w", names, "-o", "%i").strip() or (
        "COMPLETING" in stage.cluster.run("scontrol", "show", "node", names)
    ):
        assert time.monotonic() < deadline, f"{names}: still in use"
        time.sleep(0.3)


def an_attempt_on_fewer_nodes_goes_on(stage: Stage) -> None:
    # Out of the way of other cases, which would otherwise decide how many nodes are free.
    nodes = stage.cluster.run("sinfo", "-h", "-N", "-p", "gpu", "-t", "idle", "-o", "%N").split()[-2:]
    name = f"elastic-{nodes[0]}"
    stage.cluster.scontrol(
        "create", "reservation", f"ReservationName={name}", f"Nodes={','.join(nodes)}", "Users=root",
        "StartTime=now", "Duration=20", "Flags=ignore_jobs",
    )  # fmt: skip
    partitions = {"gpu": {"hardware": "h200", "nodes_max": 8, "options": [f"--reservation={name}"]}}
    try:
        _wait_until_empty(stage, nodes)  # another case's job may have come between the look and the reservation
        site = site_file(stage.folder, partitions=partitions)
        params = {"steps": STEPS, "pause_s": 0.4, "variant": "a"}  # longer than two programs take to start
        run = stage.submit("gpu", nodes=2, site=site, params=params, launch={"nodes_min": 1})
        run.wait_step(3, attempt=0)
        stage.cluster.scontrol("update", f"NodeName={nodes[1]}", "State=DRAIN", "Reason=test")
        stage.cfe("requeue", run.run_id)
        stage.requeued(run, 1)
        assert_counted(run, attempts=2)
        assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    finally:
        stage.cluster.scontrol("update", f"NodeName={nodes[1]}", "State=RESUME")
        stage.cluster.scontrol("delete", f"ReservationName={name}")
    assert [event["detail"]["world_size"] for event in run.events("started")] == [2, 1]
    assert [event["detail"] for event in run.events("degraded")] == [{"nodes": 1, "of": 2}]


def the_deepspeed_launcher_hears_of_no_preemption(stage: Stage) -> None:
    run = stage.submit("spot", resources=FOUR_RANKS, launch={"launcher": "deepspeed"})
    for attempt in range(2):
        run.wait_step(run.step() + 3, attempt=attempt)
        stage.cluster.preempt_once(run.job_id)
    assert_counted(run, attempts=3)
    assert reasons(run) == ["preempted", "preempted"]
    assert run.events("failed") == []


def a_script_that_joins_under_torchrun_is_requeued_once(stage: Stage) -> None:
    (stage.folder / "script.py").write_text("import cfe_hpc, entries\n\nentries.counting(cfe_hpc.join())\n")
    command = [sys.executable, "script.py"]
    run = stage.submit("spot", resources=FOUR_RANKS, launch={"launcher": "torchrun"}, command=command)
    run.wait_step(3, attempt=0)
    os.kill(agent_pids(run)[0], signal.SIGUSR2)
    stage.requeued(run, 1)
    run.wait_step(run.step() + 2, attempt=1)
    stage.cluster.preempt_once(run.job_id)
    assert_counted(run, attempts=3)
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert (stage.cluster.restarts(run.job_id), reasons(run)) == (2, ["requeue_requested", "preempted"])


def a_rank_that_fails_is_started_again_in_its_allocation(stage: Stage) -> None:
    run = stage.submit(
        "gpu",
        entry="entries:crashing",
        resources=FOUR_RANKS,
        launch={"launcher": "torchrun", "restarts": 1},
        params={"steps": STEPS, "pause_s": 0.1, "variant": "a", "crash_step": 9, "crash_rank": 2},
        checkpoint={"every_steps": 3},
    )
    (run.folder.path / "crash").touch()
    run.wait(lambda: run.events("failed"), 120, "failed")
    (run.folder.path / "crash").unlink()
    # Rank 0 has done step 9 by itself when it learns that rank 2 has not.
    assert_counted(run, attempts=1, lost_steps=1)
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert [(event["attempt"], event["detail"]["restart"]) for event in run.events("started")] == [(0, 0), (0, 1)]
    assert [event["step"] for event in run.events("resumed")] == [9]
    assert [event["detail"] for event in run.events("degraded")] == [{"restart": 1}]
    assert (stage.cluster.restarts(run.job_id), reasons(run)) == (0, [])


CASES = [
    a_signal_to_the_wrappers_pid_alone_saves_all_ranks,
    an_attempt_on_fewer_nodes_goes_on,
]
if os.environ.get("CFE_TEST_FULL"):
    CASES += [
        the_deepspeed_launcher_hears_of_no_preemption,
        a_script_that_joins_under_torchrun_is_requeued_once,
        a_rank_that_fails_is_started_again_in_its_allocation,
    ]
