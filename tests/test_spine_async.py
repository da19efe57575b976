"""Whole runs with asynchronous checkpoints: stopped and hurt while a save is in flight."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster
from spine.harness import SMALL, LiveRun, write_job
from spine.stage import Stage, assert_counted, rank_pids
from test_checkpoint_async import children, gone
from test_spine_local import TOTAL, Submit, submit, supervisor_of, total
from test_spine_slurm import data

from cfe_hpc.ranks.signals import STOP_SIGNALS

__all__ = ["data", "submit"]


def writers(run: LiveRun) -> list[int]:
    """Process ids of the writers of all ranks. Before there are ranks, the run's script verifies their environment."""
    found = [child for rank in children(supervisor_of(run)) for child in children(rank)]
    return [child for child in found if b"checkpoints.beside.writer" in _command(child)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def with_stopped_writer(submit: Submit, **tables: Any) -> tuple[LiveRun, int]:
    """A run whose save of step 5 is in flight, and stays so until its writer is let go on."""
    run = submit(checkpoint={"every_steps": 5, "async": True}, **tables)
    (writer,) = run.wait(lambda: writers(run), 30, "writing")
    os.kill(writer, signal.SIGSTOP)
    run.wait_step(7, attempt=0)
    assert run.events("checkpoint_saved") == []
    return run, writer


def test_a_run_stopped_again_and_again_loses_nothing(submit: Submit) -> None:
    run = submit(checkpoint={"every_steps": 1, "async": True, "keep_last": 2})
    run.wait_step(4, attempt=0)
    first = writers(run)
    os.kill(supervisor_of(run), signal.SIGTERM)
    run.wait_step(9, attempt=1)
    os.kill(supervisor_of(run), signal.SIGTERM)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"], total(result)) == ("COMPLETED", 3, 0, TOTAL)
    assert [event["step"] for event in run.events("resumed")] == [event["step"] for event in run.events("requeued")]
    assert run.events("checkpoint_failed") == []
    # One in flight at most: with one due at each boundary, some may have to wait.
    assert {event["reason"] for event in run.events("degraded")} <= {"checkpoint_late"}
    saved = [event["step"] for event in run.events("checkpoint_saved")]
    assert saved == sorted(set(saved)) and saved[-1] == 30
    assert len(list(run.folder.checkpoints.iterdir())) in (2, 3)
    assert first and all(gone(writer) for writer in first)


def test_a_stop_waits_for_the_save_in_flight_and_then_saves_its_own_step(submit: Submit) -> None:
    run, writer = with_stopped_writer(submit)
    os.kill(supervisor_of(run), signal.SIGTERM)
    run.wait(lambda: run.events("signal"), 30, "stopping")
    time.sleep(0.3)
    assert run.events("requeued") == []
    for number in STOP_SIGNALS:  # a scheduler sends them to every process of the job
        os.kill(writer, number)
    os.kill(writer, signal.SIGCONT)
    result = run.wait_result()
    assert run.events("checkpoint_failed") == []
    assert (result["state"], result["lost_steps"], total(result)) == ("COMPLETED", 0, TOTAL)
    saved = [event["step"] for event in run.events("checkpoint_saved") if event["attempt"] == 0]
    assert saved == [5, run.events("requeued")[0]["step"]] and saved[1] >= 7


def test_a_save_that_comes_due_too_early_waits_and_says_so(submit: Submit) -> None:
    run, writer = with_stopped_writer(submit)
    run.wait(lambda: run.events("degraded"), 30, "late")
    os.kill(writer, signal.SIGCONT)
    assert run.wait_result()["state"] == "COMPLETED"
    (late,) = run.events("degraded")
    assert (late["step"], late["reason"]) == (10, "checkpoint_late") and "step 5" in late["detail"]
    first, second, *_ = run.events("checkpoint_saved")
    boundary = max(beat["step"] for beat in run.folder.heartbeats() if beat["time"] <= first["time"])
    assert (first["step"], second["step"]) == (5, boundary) and boundary > 10


def test_a_writer_that_is_killed_costs_one_checkpoint(submit: Submit) -> None:
    run, writer = with_stopped_writer(submit)
    os.kill(writer, signal.SIGKILL)
    result = run.wait_result()
    assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 1, TOTAL)
    (failed,) = run.events("checkpoint_failed")
    assert failed["step"] == 5 and "the writer process has ended (signal 9)" in failed["detail"]
    saved = [event["step"] for event in run.events("checkpoint_saved")]
    assert saved[0] == 10 and saved[-1] == 30
    assert [path.name for path in run.folder.checkpoints.iterdir() if ".tmp-" in path.name] == []


def test_too_little_memory_for_staging_means_that_training_waits(submit: Submit) -> None:
    run = submit(pause_s=0.01, checkpoint={"every_steps": 5, "async": True, "staging_memory": "1KiB"})
    result = run.wait_result()
    assert (result["state"], total(result)) == ("COMPLETED", TOTAL)
    (degraded,) = run.events("degraded")
    assert degraded["reason"] == "checkpoint_staging" and "staging_memory allows 1 KiB" in degraded["detail"]
    assert [event["step"] for event in run.events("checkpoint_saved")] == [5, 10, 15, 20, 25, 30]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "zero_stage"), [("torch", 0), ("deepspeed", 2)])
def test_weights_are_those_of_an_undisturbed_run(tmp_path: Path, data: Path, kind: str, zero_stage: int) -> None:
    def start(name: str, checkpoint: dict[str, Any], pace_s: float) -> LiveRun:
        job = write_job(
            tmp_path,
            name=name,
            entry="entries:paced",
            resources={"devices_per_node": 2, "accelerator": "cpu"},
            engine={"kind": kind, "zero_stage": zero_stage, "precision": "fp32"},
            checkpoint=checkpoint,
            params={**SMALL, "steps": 30, "data": str(data)},
        )
        return LiveRun.submit(job, "local", cwd=tmp_path, env=os.environ, pace_s=pace_s)

    undisturbed = start("undisturbed", {"every_steps": 10}, 0.0).wait_result()
    run = start("disturbed", {"every_steps": 2, "async": True, "overlap": True}, 0.2)
    for attempt, step in enumerate((5, 14)):
        run.wait_step(step, attempt=attempt)
        assert len(writers(run)) == 2
        os.kill(supervisor_of(run), signal.SIGTERM)
        run.wait(lambda attempt=attempt: run.attempt() > attempt, 120, "on its next attempt")
    run.pace(0.0)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"]) == ("COMPLETED", 3, 0)
    assert run.events("checkpoint_failed") == []
    assert result["weights_sha256"] == undisturbed["weights_sha256"] is not None


@pytest.mark.slurm
@pytest.mark.slow
def test_slurm_signals_writers_too_and_they_finish_what_they_have_begun(cluster: Cluster, tmp_path: Path) -> None:
    stage = Stage(cluster, tmp_path)
    run = stage.submit("spot", nodes=2, checkpoint={"every_steps": 2, "async": True})
    for attempt in range(2):
        run.wait_step(run.step() + 3, attempt=attempt)
        pids = [pid for rank in rank_pids(run).values() for pid in children(rank)]
        assert len(pids) == 2
        cluster.preempt_once(run.job_id)
        run.wait(lambda attempt=attempt: run.attempt() > attempt, 120, "on its next attempt")
        assert all(gone(pid) for pid in pids)
    assert_counted(run, attempts=3)
    assert run.events("checkpoint_failed") == []
    assert [path.name for path in run.folder.checkpoints.iterdir() if not path.name.startswith("step-")] == []
