"""Launchers between srun and the ranks, and attempts on fewer nodes than the job would like."""

from __future__ import annotations

import os
import signal

from spine.harness import site_file
from spine.stage import Stage, agent_pids, assert_counted, reasons


def a_signal_to_the_wrappers_pid_alone_saves_all_ranks(stage: Stage) -> None:
    resources = {"nodes": 2, "devices_per_node": 2, "cpus_per_device": 4, "time": "20m", "partition": "spot"}
    run = stage.submit("spot", resources=resources, launch={"launcher": "torchrun"})
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
        run = stage.submit("gpu", nodes=2, site=site_file(stage.folder, partitions=partitions), launch={"nodes_min": 1})
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


CASES = [
    a_signal_to_the_wrappers_pid_alone_saves_all_ranks,
    an_attempt_on_fewer_nodes_goes_on,
]
