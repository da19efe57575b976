"""Stops as they happen on a real cluster: early, one-sided, in the wrong place, twice, and with nobody to ask.

The cases share one cluster of their own and run a few at a time; each has its test. Jobs that are to be preempted take
whole nodes, so that what is sent for one does not hit another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from spine.harness import ROOT, SMALL, site_file
from spine.stage import STEPS, TOTAL, Stage, assert_counted, ended, on_one_cluster, rank_pids, reasons

from cfe_hpc.files import read_toml

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

AT_A_TIME = 4


# The cases


def a_program_that_never_heard_of_cfe_hpc_is_requeued_whatever_its_status(stage: Stage) -> None:
    program = """
        trap 'echo told; exit $((SLURM_PROCID * 3))' TERM
        echo up
        test "${SLURM_RESTART_COUNT:-0}" -gt 0 && exit 0
        while :; do sleep 0.1; done
    """
    run = stage.submit("spot", nodes=2, command=["sh", "-c", program])
    run.wait(lambda: run.log("out").count("up") == 2, 60, "up on both nodes")
    stage.cluster.preempt_once(run.job_id)
    assert run.wait_result()["state"] == "COMPLETED"
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert (stage.cluster.restarts(run.job_id), reasons(run)) == (1, ["preempted"])
    assert all("told" in log.read_text() for log in run.folder.logs.glob(f"{run.job_id}.0.[01].out"))
    assert run.events("failed") == []


def a_program_that_joined_is_requeued_once_by_itself_not_by_its_wrapper_too(stage: Stage) -> None:
    (stage.folder / "script.py").write_text("import cfe_hpc, entries\n\nentries.counting(cfe_hpc.join())\n")
    run = stage.submit("spot", nodes=2, command=[sys.executable, "script.py"])
    for attempt in range(2):
        run.wait_step(run.step() + 3, attempt=attempt)
        stage.cluster.preempt_once(run.job_id)
    assert_counted(run, attempts=3)
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert (stage.cluster.restarts(run.job_id), reasons(run)) == (2, ["preempted", "preempted"])


def a_failure_on_any_rank_is_no_stop_though_srun_signals_the_others(stage: Stage) -> None:
    fails = 'test "$SLURM_PROCID" = 1 && test "${SLURM_RESTART_COUNT:-0}" = 0 && exit 7; sleep 2'
    final = stage.submit("gpu", nodes=2, command=["sh", "-c", fails.replace("sleep 2", "sleep 60")])
    again = stage.submit("gpu", nodes=2, command=["sh", "-c", fails], recovery={"failures": 1})
    assert "exit status 7" in final.wait(final.folder.result, 60, "ended")["reason"]
    assert stage.status(final)["state"] == "FAILED"
    assert stage.cluster.wait_for_end(final.job_id) == "FAILED"
    assert (stage.cluster.restarts(final.job_id), reasons(final)) == (0, [])
    stage.requeued(again, 1)
    assert again.wait_result()["state"] == "COMPLETED"
    assert reasons(again) == ["failed"]


def an_attempt_that_breaks_in_its_grace_goes_back_to_the_queue(stage: Stage) -> None:
    run = stage.submit("spot", params={"steps": 6, "pause_s": 2.0, "variant": "a"})
    run.wait_step(1, attempt=0)
    preemptor = stage.cluster.preempt(run.job_id)
    run.wait(lambda: stage.cluster.job(run.job_id)["PreemptTime"] != "None", 60, "preempted")
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    run.wait(lambda: stage.cluster.restarts(run.job_id) == 1, 60, "requeued")
    stage.cluster.scancel(preemptor)
    stage.cluster.resume(run.job_id)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["metrics"]["total"]) == ("COMPLETED", 2, sum(range(6)))
    assert reasons(run) == ["preempted"]
    assert 1 <= result["lost_steps"] <= 3


def a_preemption_before_python_runs_loses_nothing(stage: Stage) -> None:
    run = stage.submit("spot")
    stage.cluster.wait_for_state(run.job_id, "RUNNING")
    stage.cluster.preempt_once(run.job_id)
    assert_counted(run, attempts=2)
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"


def a_cancel_before_python_runs_is_a_cancel(stage: Stage) -> None:
    run = stage.submit("spot")
    stage.cluster.wait_for_state(run.job_id, "RUNNING")
    # What `cancel` does first, without its start-up: that takes as long as the ranks' own.
    run.folder.promise("cancel", user="test")
    stage.cluster.scancel(run.job_id)
    assert stage.cluster.wait_for_end(run.job_id) == "CANCELLED"
    stage.cfe("cancel", run.run_id)
    assert ended(run, "CANCELLED")
    assert (stage.cluster.restarts(run.job_id), run.step(), reasons(run)) == (0, 0, [])


def where_preemption_cancels_successors_have_successors(stage: Stage) -> None:
    run = stage.submit("spot-cancel", params={"steps": 10 * STEPS, "pause_s": 0.2, "variant": "a"})
    job_id = run.job_id
    for attempt in range(3):
        run.wait_step(run.step() + 3, attempt=attempt)
        preemptor = stage.cluster.preempt(job_id)
        record = run.wait(lambda k=attempt + 1: run.folder.promised(f"job-{k}"), 60, "followed by a successor")
        if attempt == 2:
            stage.cfe("cancel", run.run_id)
        stage.cluster.wait_for_end(job_id)
        stage.cluster.scancel(preemptor)
        job_id = record["job_id"]
        assert stage.status(run)["job_id"] == job_id
    assert stage.cluster.wait_for_end(job_id) == "CANCELLED"
    assert ended(run, "CANCELLED")
    assert [event["attempt"] for event in run.events("started")] == [0, 1, 2]
    assert [event["step"] for event in run.events("resumed")] == [event["step"] for event in run.events("requeued")][:2]
    assert stage.status(run)["lost_steps"] == 0


def a_failed_run_goes_on_when_its_user_says_so(stage: Stage) -> None:
    params = {"steps": STEPS, "pause_s": 0.1, "variant": "a", "crash_step": 9, "crash_rank": 0}
    run = stage.submit("gpu", entry="entries:crashing", params=params, checkpoint={"every_steps": 3})
    (run.folder.path / "crash").touch()
    ended(run, "FAILED")
    (run.folder.path / "crash").unlink()
    again = json.loads(stage.cfe("requeue", run.run_id, "--json").stdout)
    assert again["action"] == "resubmitted"
    ended(run, "COMPLETED")
    assert_counted(run, attempts=2)
    assert stage.cluster.wait_for_end(again["job_id"]) == "COMPLETED"
    refused = stage.cfe("requeue", run.run_id, status=2).stderr.splitlines()
    assert len(refused) == 1 and "has completed" in refused[0]
    assert "ended before: COMPLETED" in stage.cfe("cancel", run.run_id).stdout


def a_spent_budget_holds_the_run_until_its_user_says_so(stage: Stage) -> None:
    run = stage.submit("spot", recovery={"preemptions": 1})
    run.wait_step(3, attempt=0)
    stage.cluster.preempt_once(run.job_id)
    run.wait_step(run.step() + 3, attempt=1)
    preemptor = stage.cluster.preempt(run.job_id)
    held = ended(run, "HELD")
    assert "preemption number 2; the job allows 1 (recovery.preemptions)" in held["reason"]
    stage.cluster.scancel(preemptor)
    status = stage.status(run)
    assert (status["state"], status["lost_steps"], status["reason"]) == ("HELD", 0, held["reason"])
    assert stage.cluster.wait_for_end(run.job_id) == "FAILED"
    # A scheduler may start a job that failed in its grace time again by itself (Slurm from 24.05 on does).
    stage.cluster.scontrol("requeue", run.job_id)
    stage.cluster.hurry(run.job_id)
    assert stage.cluster.wait_for_end(run.job_id) == "FAILED"
    assert stage.status(run)["state"] == "HELD"
    assert len(run.events("started")) == 2
    stage.cfe("requeue", run.run_id)
    ended(run, "COMPLETED")
    assert_counted(run, attempts=3)


def cancel_ends_what_never_started_and_says_what_had_ended(stage: Stage) -> None:
    gpu = read_toml(ROOT / "site_configs" / "minislurm.toml")["partitions"]["gpu"]
    run = stage.submit("gpu", site=site_file(stage.folder, partitions={"gpu": {**gpu, "options": ["--hold"]}}))
    assert stage.status(run)["state"] == "HELD"
    assert "cancelled" in stage.cfe("cancel", run.run_id).stdout
    assert stage.status(run)["state"] == "CANCELLED"
    assert stage.cluster.wait_for_end(run.job_id) == "CANCELLED"
    assert "ended before: CANCELLED" in stage.cfe("cancel", run.run_id).stdout


def a_crash_of_one_rank_ends_all_and_is_named(stage: Stage) -> None:
    params = {"steps": STEPS, "pause_s": 0.1, "variant": "a", "crash_step": 5, "crash_rank": 1}
    run = stage.submit("gpu", nodes=2, entry="entries:crashing", params=params)
    (run.folder.path / "crash").touch()
    assert "ArithmeticError: step 5 went wrong" in ended(run, "FAILED")["reason"]
    assert stage.cluster.wait_for_end(run.job_id) == "FAILED"
    assert "step 5 went wrong" in stage.cfe("logs", run.run_id, "--first-error").stdout
    assert "step 5 went wrong" in stage.status(run)["reason"]
    assert rank_pids(run) == {}
    assert reasons(run) == []


def a_signal_to_one_rank_stops_all_at_one_step(stage: Stage) -> None:
    run = stage.submit("gpu", nodes=2)
    run.wait_step(4, attempt=0)
    os.kill(rank_pids(run)[1], signal.SIGTERM)
    stage.requeued(run, 1)
    assert_counted(run, attempts=2)
    assert reasons(run) == ["requeue_requested"]
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"


def a_stop_inside_an_evaluation_repeats_the_evaluation_not_the_step(stage: Stage) -> None:
    texts = stage.folder / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02d}.txt").write_text(f"the {number} lazy dogs and the quick fox {number * 7919}\n" * 60)
    data = stage.folder / "tokens.h5"
    stage.cfe("data", "build", str(data), str(texts))
    params = {**SMALL, "steps": 20, "eval_every": 10, "eval_batches": 24, "data": str(data)}
    job = {"entry": "entries:evaluating", "engine": {"kind": "torch"}, "params": params}
    undisturbed = stage.submit("spot", **job)
    run = stage.submit("spot", **job)
    run.pace(0.3)
    run.wait_step(6, attempt=0)
    (run.folder.path / "eval_pace").write_text("0.5")
    batches = run.folder.path / "evaluated"
    run.wait(lambda: len(batches.read_text().splitlines()) >= 28, 60, "in its evaluation")
    stage.cluster.preempt_once(run.job_id)
    run.pace(0)
    (run.folder.path / "eval_pace").unlink()
    for each in (run, undisturbed):  # the last figures are added to result.json after it was written
        assert stage.cluster.wait_for_end(each.job_id) == "COMPLETED"
    result, expected = run.wait_result(), undisturbed.wait_result()
    assert (result["lost_steps"], [event["step"] for event in run.events("resumed")]) == (0, [10])
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert [result["metrics"][name] for name in ("first_val_loss", "val_loss")] == [
        expected["metrics"][name] for name in ("first_val_loss", "val_loss")
    ]
    counts = [sum(line.startswith(f"{attempt} ") for line in batches.read_text().splitlines()) for attempt in (0, 1)]
    assert 24 < counts[0] < 48 and counts[1] >= 24


CASES: list[Callable[[Stage], None]] = [
    a_stop_inside_an_evaluation_repeats_the_evaluation_not_the_step,
    a_program_that_joined_is_requeued_once_by_itself_not_by_its_wrapper_too,
    where_preemption_cancels_successors_have_successors,
    a_spent_budget_holds_the_run_until_its_user_says_so,
    a_failed_run_goes_on_when_its_user_says_so,
    a_signal_to_one_rank_stops_all_at_one_step,
    a_crash_of_one_rank_ends_all_and_is_named,
    a_preemption_before_python_runs_loses_nothing,
    an_attempt_that_breaks_in_its_grace_goes_back_to_the_queue,
    a_program_that_never_heard_of_cfe_hpc_is_requeued_whatever_its_status,
    a_failure_on_any_rank_is_no_stop_though_srun_signals_the_others,
    a_cancel_before_python_runs_is_a_cancel,
    cancel_ends_what_never_started_and_says_what_had_ended,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """Each case's outcome, by its name; all of them begin with the first one asked for."""
    cases = {case.__name__: case for case in CASES}
    nodes = str(2 * AT_A_TIME + 2)
    with on_one_cluster(cases, tmp_path_factory.mktemp("stops"), "--nodes", nodes, at_a_time=AT_A_TIME) as found:
        yield found


@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_stop(outcomes: dict[str, Future[None]], name: str) -> None:
    outcomes[name].result(timeout=550)


@pytest.fixture(scope="module")
def user_signal_cluster() -> Iterator[Cluster]:
    """A cluster that preempts with the job's own signal instead of TERM, kills what takes too much memory, and whose
    controller may be hurt."""
    cluster = Cluster.start("--nodes", "2", "--gaudi-nodes", "1", "--user-signal", "--memory-limits")
    try:
        yield cluster
    finally:
        cluster.stop()


def test_a_preemption_with_the_users_signal_is_a_preemption(user_signal_cluster: Cluster, tmp_path: Path) -> None:
    stage = Stage(user_signal_cluster, tmp_path)
    run = stage.submit("spot")
    run.wait_step(4, attempt=0)
    stage.cluster.preempt_once(run.job_id)
    assert_counted(run, attempts=2)
    assert reasons(run) == ["preempted"]
    assert run.events("signal")[0]["reason"] == "SIGUSR2"


def test_a_rank_that_takes_more_than_its_job_asked_for_is_out_of_memory(
    user_signal_cluster: Cluster, tmp_path: Path
) -> None:
    stage = Stage(user_signal_cluster, tmp_path)
    resources = {"devices_per_node": 1, "cpus_per_device": 8, "memory": "1GiB", "partition": "gpu", "nodes": 2}
    params = {"steps": STEPS, "state_bytes": 1 << 20, "pause_s": 0.1}
    run = stage.submit(
        "gpu", entry="entries_chaos:bulky", resources=resources, checkpoint={"every_steps": 5}, params=params
    )
    (run.folder.path / "chaos").mkdir()
    run.wait_step(7, attempt=0)
    (run.folder.path / "chaos" / "memory.1").touch()
    stage.requeued(run, 1)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["metrics"]["total"]) == ("COMPLETED", 2, TOTAL), run.diagnosis()
    assert result["lost_steps"] <= 5
    assert reasons(run) == ["oom_host"], run.diagnosis()


def test_a_stop_waits_for_a_controller_that_gives_no_answer(user_signal_cluster: Cluster, tmp_path: Path) -> None:
    stage = Stage(user_signal_cluster, tmp_path)
    run = stage.submit("gpu")
    run.wait_step(4, attempt=0)
    with stage.cluster.controller_paused():
        os.kill(rank_pids(run)[0], signal.SIGTERM)
        run.wait(lambda: "asking again" in run.log(), 60, "left without an answer")
        assert run.folder.promised("requeued-0") is None
        assert run.events("checkpoint_saved")[-1]["step"] == run.step()
    stage.requeued(run, 1)
    assert_counted(run, attempts=2)
    assert reasons(run) == ["requeue_requested"]
