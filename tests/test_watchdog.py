"""Hangs: no step ends any more. Real ranks, stopped for real; and what is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spine.harness import LiveRun, write_job

from cfe_hpc.config.job import Recovery
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.watchdog import Watchdog
from cfe_hpc.runfolder import RunFolder

ALONE = """
import sys, time
from pathlib import Path
from cfe_hpc.config.job import Recovery
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.watchdog import Watchdog
from cfe_hpc.runfolder import RunFolder

def stuck(seconds):
    time.sleep(seconds)

dog = Watchdog(RunFolder(Path(sys.argv[1])), read_facts(), Recovery(hang_after=0.4, hang_factor=1.5))
dog.beat(1)
for step in range(2, 5):
    time.sleep(0.2)
    dog.beat(step)
with dog.patient(60.0):
    time.sleep(1.0)
print("patient", flush=True)
stuck(float(sys.argv[2]))
print("done", flush=True)
dog.close()
time.sleep(0.6)
"""
SUPERVISED = {"CFE_RANK": "0", "CFE_LOCAL_RANK": "0", "CFE_WORLD_SIZE": "1", "CFE_LOCAL_WORLD_SIZE": "1"}


def watched(folder: Path, seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that trains, waits patiently, and is stuck for so long."""
    return subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(seconds)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_rank_that_hangs_shows_where_and_ends(tmp_path: Path) -> None:
    done = watched(tmp_path, 30, **SUPERVISED)
    assert (done.returncode, done.stdout) == (1, "patient\n")
    assert "in stuck" in done.stderr
    (failed,) = RunFolder(tmp_path).events()
    assert (failed["event"], failed["cause"], failed["step"]) == ("failed", "hang", 4)
    assert failed["reason"].startswith("no step for ") and failed["reason"].endswith("every rank waits")
    assert RunFolder(tmp_path).promised("hang-0.0") is not None


def test_a_script_started_by_hand_is_only_told(tmp_path: Path) -> None:
    done = watched(tmp_path, 1.2)
    assert (done.returncode, done.stdout) == (0, "patient\ndone\n")
    assert "in stuck" in done.stderr
    assert list(RunFolder(tmp_path).events()) == []


def test_a_process_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    program = ALONE.replace("stuck(float(sys.argv[2]))", "time.sleep(0.1)").replace("hang_after=0.4", "hang_after=1.0")
    program = program.replace('print("patient"', 'print("ready", flush=True); sys.stdin.readline(); print("patient"')
    with subprocess.Popen(
        [sys.executable, "-c", program.replace("time.sleep(0.2)", "time.sleep(0.01)"), str(tmp_path), "0"],
        env={**os.environ, **SUPERVISED},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate("on\n", timeout=30)
    assert (process.returncode, out) == (0, "patient\ndone\n"), err


def test_the_limit_follows_the_median_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("cfe_hpc.ranks.watchdog.time.monotonic", lambda: now_s[0])
    dog = Watchdog(RunFolder(tmp_path), read_facts({}), Recovery(hang_after=100.0, hang_factor=30.0))
    for step, seconds in enumerate([500.0, 10.0, 11.0, 90.0]):  # the first may compile for long
        now_s[0] += seconds
        dog.beat(step)
        dog.beat(step)  # agreeing within a step is no step
    limit_s = dog.limit_s()
    with dog.patient(3600.0):
        patient_s = dog.limit_s()
    dog.close()
    assert (limit_s, patient_s) == (330.0, 3600.0)


def test_no_watchdog_where_the_job_wants_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE.replace("hang_after=0.4", "hang_after=0.0"), str(tmp_path), "1"],
        env={**os.environ, **SUPERVISED},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "patient\ndone\n", "")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[LiveRun]:
    """Two ranks that count, watched closely; their supervisor is gone when the test is."""
    job: dict[str, Any] = {
        "name": "hang",
        "entry": "entries:counting",
        "resources": {"nodes": 1, "devices_per_node": 2},
        "params": {"steps": 30, "pause_s": 0.1, "variant": "a"},
        "checkpoint": {"every_steps": 10},
        "recovery": {"hang_after": "8s", "hang_factor": 10.0},
    }
    site = ["--set", "site.slurm.kill_wait=2s"]
    run = LiveRun.submit(write_job(tmp_path, **job), "local", cwd=tmp_path, env=os.environ, words=tuple(site))
    yield run
    supervisor = int(run.job_id.removeprefix("local-"))
    if Path(f"/proc/{supervisor}").exists() and run.folder.result() is None:
        os.kill(supervisor, signal.SIGKILL)


def rank_pid(run: LiveRun, rank: int) -> int:
    supervisor = int(run.job_id.removeprefix("local-"))
    for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        if f"CFE_RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"rank {rank} does not run")


def test_a_stopped_rank_is_named_and_the_run_goes_on(run: LiveRun) -> None:
    run.wait_step(14, attempt=0)
    os.kill(rank_pid(run, 1), signal.SIGSTOP)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["metrics"]["total"]) == ("COMPLETED", 2, sum(range(30)))
    (failed,) = [event for event in run.events("failed") if event.get("cause") == "hang"]
    assert (failed["attempt"], failed["rank"]) == (0, 1)
    assert "no sign of rank 1 (localhost)" in failed["reason"]
    assert [event["reason"] for event in run.events("requeued")] == ["hang"]
    (log,) = run.folder.logs.glob("*.0.0.err")
    assert "most recent call first" in log.read_text() and "all_max" in log.read_text()
    assert 0 < result["lost_steps"] <= 10
    assert result["buckets"]["lost"] > 4.0
