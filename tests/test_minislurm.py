"""The cluster behaves as real ones do: what preemption, cancelling and dead nodes make of a job.

These are the facts that the product rests on. All jobs are hurt at the same time, because Slurm takes most of a minute
to requeue one; each test then looks at one of them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm.cluster import SCRIPT, Cluster

pytestmark = pytest.mark.slurm

# Each task notes every TERM, with what Slurm says of the job at that moment, and then does what the case is about.
TASK = """\
import os, signal, subprocess, sys, time
def on_term(number, frame):
    command = ["scontrol", "show", "job", "-o", os.environ["SLURM_JOB_ID"]]
    shown = subprocess.run(command, capture_output=True, text=True)
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    with open(sys.argv[1], "a") as notes:
        notes.write(f"attempt={attempt} {shown.stdout}")
    exec(sys.argv[2])
signal.signal(signal.SIGTERM, on_term)
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    sys.exit(0)
open(sys.argv[1] + ".ready", "w").close()
while True:
    time.sleep(0.1)
"""

REQUEUE = 'subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])'


@dataclass(frozen=True)
class Case:
    """A job to be hurt. `on_term` is what its task does when TERM comes."""

    job_id: str
    notes: Path

    def terms(self) -> list[str]:
        """One line for each TERM that the first attempt's task got."""
        return [line for line in self.notes.read_text().splitlines() if line.startswith("attempt=0 ")]


def submit(cluster: Cluster, folder: Path, name: str, partition: str, nodes: str, on_term: str) -> Case:
    script = folder / "task.py"
    script.write_text(TASK)
    notes = folder / name
    batch = folder / f"{name}.sh"
    batch.write_text(f"#!/bin/sh\nexec srun {sys.executable} {script} {notes} '{on_term}'\n")
    count = str(len(nodes.split(",")))
    job_id = cluster.sbatch(
        *("-J", name, "-p", partition, "-N", count, "-w", nodes, "-n", count, "--requeue", "-t", "5"),
        *("-o", f"{folder}/{name}.out", "--open-mode=append", str(batch)),
    )
    return Case(job_id, notes)


@pytest.fixture(scope="module")
def cases(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """Jobs of every kind, running, and then preempted, cancelled or without their node, all at once."""
    folder = tmp_path_factory.mktemp("cases")
    before = cluster.job_ids()
    jobs = {
        "stays": submit(cluster, folder, "stays", "spot", "n1", "pass"),
        "exits": submit(cluster, folder, "exits", "spot", "n2", "os._exit(0)"),
        "requeues": submit(cluster, folder, "requeues", "spot", "n3", REQUEUE),
        "no-return": submit(cluster, folder, "no-return", "spot-cancel", "n4", "pass"),
        "cancelled": submit(cluster, folder, "cancelled", "spot", "n5", "os._exit(1)"),
        "node-lost": submit(cluster, folder, "node-lost", "gpu", "n6,n7", "pass"),
    }
    for case in jobs.values():
        cluster.wait_for(Path(f"{case.notes}.ready").exists, 60, f"{case.notes.name} runs")
    preemptors = [cluster.preempt(jobs[name].job_id) for name in ("stays", "exits", "requeues", "no-return")]
    cluster.scancel(jobs["cancelled"].job_id)
    cluster.kill_node("n7")
    for name in ("stays", "requeues", "node-lost"):
        cluster.wait_for_restart(jobs[name].job_id, 1)
    cluster.scancel(*preemptors)
    yield jobs
    cluster.tidy(keep=before)


def test_preempted_job_that_stays_alive_is_requeued(cluster: Cluster, cases: dict[str, Case]) -> None:
    case = cases["stays"]
    cluster.resume(case.job_id)
    assert cluster.wait_for_end(case.job_id) == "COMPLETED"
    # TERM when it is preempted, and again once the grace time is over, just before the kill.
    assert len(case.terms()) >= 2


def test_preempted_job_that_exits_cleanly_in_its_grace_time_loses_its_work(
    cluster: Cluster, cases: dict[str, Case]
) -> None:
    case = cases["exits"]
    assert cluster.wait_for_end(case.job_id) == "COMPLETED"
    assert cluster.restarts(case.job_id) == 0


def test_preempted_job_that_requeues_itself_runs_again(cluster: Cluster, cases: dict[str, Case]) -> None:
    case = cases["requeues"]
    cluster.resume(case.job_id)
    assert cluster.wait_for_end(case.job_id) == "COMPLETED"
    assert cluster.restarts(case.job_id) == 1


def test_job_of_a_cancelling_partition_is_not_requeued(cluster: Cluster, cases: dict[str, Case]) -> None:
    case = cases["no-return"]
    assert cluster.wait_for_end(case.job_id) == "PREEMPTED"
    assert cluster.restarts(case.job_id) == 0


def test_job_that_loses_a_node_is_requeued(cluster: Cluster, cases: dict[str, Case]) -> None:
    case = cases["node-lost"]
    cluster.start_node("n7")
    cluster.resume(case.job_id)
    assert cluster.wait_for_end(case.job_id) == "COMPLETED"
    cluster.wait_for(
        lambda: [row[0] for row in cluster.sacct(case.job_id, "State")] == ["NODE_FAIL", "COMPLETED"],
        30,
        "both attempts in the accounting",
    )


def test_preempt_time_tells_preemption_from_scancel(cluster: Cluster, cases: dict[str, Case]) -> None:
    preempted, cancelled = cases["stays"].terms()[0], cases["cancelled"].terms()[0]
    assert "JobState=RUNNING" in preempted and "PreemptTime=20" in preempted
    assert "JobState=COMPLETING" in cancelled and "PreemptTime=20" not in cancelled
    assert cluster.wait_for_end(cases["cancelled"].job_id) == "CANCELLED"


@pytest.mark.parametrize(
    ("partition", "gres", "devices"), [("gpu", "gpu:h200:2", "0,1"), ("gaudi", "gpu:gaudi3:8", "0,1,2,3,4,5,6,7")]
)
def test_devices_asked_for_are_named_to_the_task(cluster: Cluster, partition: str, gres: str, devices: str) -> None:
    shown = cluster.run("srun", "-p", partition, f"--gres={gres}", "-t", "1", "printenv", "CUDA_VISIBLE_DEVICES")
    assert shown.strip() == devices


def test_second_cluster_stands_beside_the_first(cluster: Cluster) -> None:
    other = Cluster.start("--nodes", "1", "--gaudi-nodes", "0", "--user-signal")
    try:
        assert "preempt_send_user_signal" in other.scontrol("show", "config")
        assert other.run("srun", "-t", "1", "printenv", "SLURMD_NODENAME").strip() == "n1"
        assert set(cluster.run("sinfo", "-h", "-N", "-o", "%N").split()) > {"n1", "n8", "g1"}
    finally:
        other.stop()
    assert not other.root.exists()


def test_down_ends_everything_the_cluster_started(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster.start("--nodes", "1", "--gaudi-nodes", "0")
    try:
        # In a session of its own, where no signal to the job's process group reaches it.
        child = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 987' & wait"
        other.sbatch("-o", "/dev/null", "--wrap", child)
        pid = other.wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip(), 30)
        down = subprocess.run([sys.executable, SCRIPT, "--dir", other.root, "down"], timeout=60, capture_output=True)
        assert down.returncode == 0, down.stderr
    finally:
        other.stop()
    assert not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_up_again_changes_nothing(cluster: Cluster) -> None:
    before = (cluster.root / "cluster.json").read_text()
    again = subprocess.run([sys.executable, SCRIPT, "--dir", cluster.root, "up"], timeout=60, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert (cluster.root / "cluster.json").read_text() == before
