"""Time: a rank that stands still is found, and the books agree with Slurm's own accounting."""

from __future__ import annotations

import os
import signal
from datetime import datetime

from spine.harness import LiveRun
from spine.stage import STEPS, Stage, assert_counted, rank_pids, reasons

from cfe_hpc.recovery.ledger import parts_of

STAMP_S = 1.0
"""Accounting's stamps are whole seconds."""
EDGE_S = 4.0
"""From the job's start to its script's first line, and from its last to the job's end, on a busy machine."""


def accounted_s(stage: Stage, run: LiveRun, attempts: int) -> list[float]:
    """How long each attempt had its nodes, by Slurm's accounting."""

    def rows() -> list[list[str]] | None:
        found = stage.cluster.sacct(run.job_id, "Start,End")
        return found if len(found) == attempts and all("Unknown" not in row for row in found) else None

    def seconds(start: str, end: str) -> float:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()

    return [seconds(*row) for row in stage.cluster.wait_for(rows, 60, f"{attempts} attempts in sacct")]


def a_stopped_rank_is_a_hang(stage: Stage) -> None:
    watch = {"hang_after": "8s", "hang_factor": 10.0}
    run = stage.submit("gpu", nodes=2, checkpoint={"every_steps": 10}, recovery=watch)
    run.wait_step(14, attempt=0)
    os.kill(rank_pids(run)[1], signal.SIGSTOP)
    stage.requeued(run, 1)
    result = run.wait_result()
    assert_counted(run, attempts=2, lost_steps=result["lost_steps"])
    assert 0 < result["lost_steps"] < STEPS - 10
    assert reasons(run) == ["hang"]
    failed = next(event for event in run.events("failed") if event.get("cause") == "hang")
    host = run.events("started")[0]["detail"]["hosts"][1]
    assert (failed["rank"], failed["host"]) == (1, host)
    assert f"no sign of rank 1 ({host})" in failed["reason"]
    assert "most recent call first" in (run.folder.logs / f"{run.job_id}.0.0.err").read_text()

    stage.cluster.wait_for_end(run.job_id)
    slurms_s = accounted_s(stage, run, attempts=2)
    ours_s = [part.allocated_s for part in parts_of(run.folder)]
    for ours, slurms in zip(ours_s, slurms_s, strict=True):
        assert -STAMP_S <= slurms - ours <= STAMP_S + EDGE_S, (ours_s, slurms_s)
    buckets = (run.folder.result() or {})["buckets"]
    assert abs(sum(buckets.values()) - buckets["queue"] - sum(ours_s)) <= 0.01 * sum(ours_s)
    assert buckets["lost"] > 8.0


CASES = [a_stopped_rank_is_a_hang]
