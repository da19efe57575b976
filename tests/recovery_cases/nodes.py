"""Nodes that fail: named, avoided by the next attempt, and by the next job."""

from __future__ import annotations

import subprocess
import sys

from spine.harness import LiveRun, site_file
from spine.stage import Stage, assert_counted, ended, reasons

LOCAL = {"every_steps": 5, "async": True, "local": True}

# Runs in the batch script: the last node of the first attempt has no room on its own disk.
FILL = """
[ -e {root}/full ] || {{
    full=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
    mkdir -p {root}/$full && mount -t tmpfs -o size=64k tmpfs {root}/$full
    head -c 65536 /dev/zero >{root}/$full/ballast || true
    echo $full >{root}/full
}}
"""


def assert_avoids(stage: Stage, node: str) -> None:
    """A job that is sent now is kept off the node."""
    run = stage.submit("gpu", command=["true"])
    assert stage.cluster.job(run.job_id)["ExcNodeList"] == node
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"


def excluded(run: LiveRun) -> list[str]:
    """The nodes that the run has had excluded."""
    return [event["detail"]["node"] for event in run.events("degraded") if event["reason"] == "node_excluded"]


def a_node_without_local_space_is_named_and_avoided(stage: Stage) -> None:
    root = stage.folder / "local"
    site = site_file(
        stage.folder,
        storage={"node_local": f"{root}/$SLURMD_NODENAME"},
        environment={"setup": FILL.format(root=root).splitlines()},
    )
    try:
        run = stage.submit("gpu", nodes=2, site=site, checkpoint=LOCAL)
        stage.requeued(run, 1)
        node = (root / "full").read_text().strip()
        (failed,) = run.events("failed")
        assert (failed["host"], failed["cause"], failed["attempt"]) == (node, "node_unfit", 0)
        assert f"preflight: {node}: " in failed["reason"] and "checkpoints need 1 GiB" in failed["reason"]
        assert_counted(run, attempts=2)
        (started,) = run.events("started")
        assert started["attempt"] == 1 and node not in started["detail"]["hosts"]
        assert started["detail"]["preflight"]["bandwidth_bytes_per_s"] > 0
        assert (reasons(run), excluded(run)) == (["node_unfit"], [node])
        assert_avoids(stage, node)
    finally:
        for mount in root.glob("*/ballast"):
            subprocess.run(["umount", "--lazy", str(mount.parent)], check=True, timeout=30)


def a_dead_node_is_avoided_by_the_next_attempt_and_the_next_job(stage: Stage) -> None:
    run = stage.submit("gpu", nodes=2, checkpoint={"every_steps": 5})
    run.wait_step(12, attempt=0)
    (started,) = run.events("started")
    node = started["detail"]["hosts"][1]
    stage.cluster.kill_node(node)
    run.wait(lambda: stage.cluster.restarts(run.job_id) == 1, 90, "requeued")
    # It is back at once, and idle: the first to get the job again.
    stage.cluster.start_node(node)

    def over() -> bool:
        if stage.cluster.state(run.job_id) == "PENDING":
            stage.cluster.resume(run.job_id)
        return run.folder.result() is not None

    run.wait(over, 120, "ended")
    assert ended(run, "COMPLETED")["lost_steps"] <= 7, run.diagnosis()
    assert excluded(run) == [node], run.diagnosis()
    last = run.events("started")[-1]
    assert node not in last["detail"]["hosts"], run.diagnosis()
    assert_avoids(stage, node)


def a_job_that_may_not_be_requeued_goes_on_in_a_successor(stage: Stage) -> None:
    run = stage.submit("gpu", command=[sys.executable, "-c", WAITS])
    run.wait(lambda: "up" in run.log("out"), 60, "up")
    stage.cluster.scontrol("update", f"JobId={run.job_id}", "Requeue=0")
    stage.cfe("requeue", run.job_id)
    successor = run.wait(lambda: run.folder.promised("job-1"), 60, "followed by a successor")["job_id"]
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert stage.cluster.wait_for_end(successor) == "COMPLETED"
    assert stage.cluster.restarts(run.job_id) == 0
    assert (run.folder.result() or {})["state"] == "COMPLETED"
    assert reasons(run) == ["requeue_requested"]


# Ends on the first signal, and at once in every attempt but the first.
WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
print("up", flush=True)
time.sleep(600 * (os.environ["CFE_ATTEMPT_BASE"] == "0"))
"""

CASES = [
    a_dead_node_is_avoided_by_the_next_attempt_and_the_next_job,
    a_node_without_local_space_is_named_and_avoided,
    a_job_that_may_not_be_requeued_goes_on_in_a_successor,
]
