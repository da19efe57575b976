"""Reasons told apart from what scontrol shows; the lines are as Slurm 22.05.8 printed them, shortened."""

import time
from datetime import datetime

import pytest

from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Preemption
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.scheduler import TIMER, JobRecord, LocalScheduler, SlurmScheduler
from cfe_hpc.runfolder import RunFolder

PLAN = Plan(
    partition="spot",
    queue="spot",
    nodes=2,
    devices_per_node=1,
    world_size=2,
    cpus_per_device=1,
    accelerator="cpu",
    time_s=3600.0,
    signal="USR2",
    signal_lead_s=120,
    preemption=Preemption(mode="requeue", grace=30.0),
)


def stamp(seconds_from_now: float) -> str:
    return datetime.fromtimestamp(time.time() + seconds_from_now).isoformat(timespec="seconds")


def shown(state="RUNNING", preempt="None", end_s=3000.0, restarts=0, limit="01:00:00", ran="00:10:00") -> str:
    return (
        f"JobId=7 JobName=a UserId=u(0) JobState={state} Reason=None Requeue=1 Restarts={restarts} "
        f"RunTime={ran} TimeLimit={limit} EndTime={stamp(end_s)} PreemptEligibleTime={stamp(-9)} PreemptTime={preempt}"
    )


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path, "job")


@pytest.mark.parametrize(
    ("record", "signals", "cause"),
    [
        (shown(preempt=stamp(0), end_s=30), ["SIGTERM"], "preempted"),
        (shown(preempt=stamp(0), end_s=30), ["SIGUSR2"], "preempted"),
        (shown(state="COMPLETING"), ["SIGTERM"], "cancelled"),
        (shown(state="CANCELLED"), ["SIGTERM"], "cancelled"),
        (shown(end_s=110), ["SIGUSR2"], "time_limit"),
        (shown(end_s=175), ["SIGUSR2"], "time_limit"),
        (shown(state="COMPLETING", ran="01:00:02", end_s=0), ["SIGTERM"], "time_limit"),
        (shown(end_s=2000), ["SIGUSR1"], "requeue_requested"),
        (shown(limit="UNLIMITED", end_s=100), ["SIGUSR2"], "requeue_requested"),
        (shown(state="PENDING", restarts=1), ["SIGTERM"], "requeued_already"),
        (shown(state="NODE_FAIL"), ["SIGTERM"], "node_failure"),
    ],
)
def test_the_record_tells_why(folder, record, signals, cause):
    facts = read_facts({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"})
    scheduler = SlurmScheduler(folder, facts, PLAN)
    judged, evidence = scheduler._judge(JobRecord.parse(record), signals, time.time())
    assert judged == cause
    assert evidence


def test_the_runs_own_timer_needs_no_looking_into(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder.path))  # nobody could be asked
    facts = read_facts({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"})
    slurm = SlurmScheduler(folder, facts, PLAN)
    assert slurm.why([TIMER])[0] == local(folder).why([TIMER])[0] == "time_limit"
    assert slurm.why(["SIGTERM", TIMER])[0] == "unknown"
    folder.promise("cancel", user="ada")
    assert slurm.why([TIMER])[0] == local(folder).why([TIMER])[0] == "cancelled"


def test_the_record_tells_whether_a_job_may_be_requeued():
    assert JobRecord.parse(shown()).requeue
    assert not JobRecord.parse(shown().replace("Requeue=1", "Requeue=0")).requeue


def local(folder):
    facts = read_facts({"CFE_RANK": "0", "CFE_LOCAL_RANK": "0", "CFE_WORLD_SIZE": "1", "CFE_LOCAL_WORLD_SIZE": "1"})
    return LocalScheduler(folder, facts)


def test_a_users_cancel_beats_everything(folder):
    folder.promise("stop-0", reason="preempted")
    folder.promise("requeue-0", user="ada")
    assert local(folder).why(["SIGTERM"])[0] == "requeue_requested"
    folder.promise("cancel", user="ada")
    assert local(folder).why(["SIGTERM"]) == ("cancelled", "cancel asked for by ada")


def test_the_supervisor_says_time_limit(folder):
    folder.promise("stop-0", reason="time_limit")
    assert local(folder).why(["SIGUSR2"])[0] == "time_limit"


def test_a_promise_is_kept_once(folder):
    assert folder.promise("requeued-0", reason="preempted")
    assert not folder.promise("requeued-0", reason="again")
    assert folder.promised("requeued-0")["reason"] == "preempted"
    assert sorted(path.name for path in folder.control.iterdir()) == ["requeued-0"]
