"""Ends of attempts that leave little behind: what srun and slurmstepd say of them, and what the next attempt finds."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from spine.stage import TOTAL, Stage, ended, rank_pids, reasons


def a_slurmd_that_dies_alone_is_fenced_and_its_node_named(stage: Stage) -> None:
    """The rank goes on training, and Slurm, which takes the node for dead, starts the next attempt elsewhere."""
    run = stage.submit("gpu", checkpoint={"every_steps": 5}, params={"steps": 400, "pause_s": 0.15, "variant": "a"})
    run.wait_step(8, attempt=0)
    (started,) = run.events("started")
    (node,) = started["detail"]["hosts"]
    (ghost,) = rank_pids(run).values()
    stage.cluster.kill_slurmd(node)
    try:
        stage.requeued(run, 1)
        run.wait(lambda: run.attempt() == 1, 60, "begun elsewhere")
        run.wait(lambda: not Path(f"/proc/{ghost}").exists(), 90, "fenced")
    finally:
        stage.cluster.start_node(node)
    (failed,) = run.events("failed")
    assert (failed["attempt"], failed["host"], failed["cause"]) == (0, node, "node_failure"), run.diagnosis()
    (avoided,) = run.events("degraded")
    assert (avoided["reason"], avoided["detail"]["node"]) == ("node_excluded", node), run.diagnosis()
    assert run.events("started")[-1]["detail"]["hosts"] != [node]
    stage.cfe("cancel", run.run_id)
    stage.cluster.wait_for_end(run.job_id)


def a_rank_that_is_killed_is_named_by_srun(stage: Stage) -> None:
    """The others only say that it is gone."""
    run = stage.submit("gpu", nodes=2, recovery={"failures": 1}, checkpoint={"every_steps": 5})
    run.wait_step(8, attempt=0)
    os.kill(rank_pids(run)[1], signal.SIGKILL)
    stage.requeued(run, 1)
    assert ended(run, "COMPLETED")["metrics"]["total"] == TOTAL, run.diagnosis()
    assert reasons(run) == ["failed"], run.diagnosis()
    said = {event.get("rank"): event["reason"] for event in run.events("failed")}
    assert said[1] == "rank 1: killed", run.diagnosis()
    assert run.folder.promised("ended-0"), run.diagnosis()


CASES = [a_slurmd_that_dies_alone_is_fenced_and_its_node_named, a_rank_that_is_killed_is_named_by_srun]
