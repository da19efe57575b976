"""The supervisor that plays the scheduler on this machine, with rank programs of a few lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import events, kill_quietly, make_folder, make_spec, pid_exists

from cfe_hpc.runfolder import RunFolder

# What a rank program starts with: its place, a word to the test once it hears signals, and what it heard.
PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from cfe_hpc.runfolder import RunFolder
folder = RunFolder(Path(os.environ["CFE_RUN_DIR"]))
rank, attempt = int(os.environ["CFE_RANK"]), int(os.environ["CFE_ATTEMPT"])
heard = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
environment = {name: value for name, value in os.environ.items() if name.startswith("CFE_")}
folder.promise(f"up-{attempt}-{rank}", pid=os.getpid(), environment=environment)
def wait_for_signal():
    while not heard:
        time.sleep(0.02)
def requeue():
    folder.promise(f"heard-{attempt}-{rank}", heard=heard, stop=folder.promised(f"stop-{attempt}"))
    if rank == 0:
        folder.promise(f"requeued-{attempt}", reason="test", step=1)
def complete():
    if rank == 0:
        folder.write_result({"state": "COMPLETED"})
"""
UNTIL_TOLD = PRELUDE + "if attempt: complete(); sys.exit()\nwait_for_signal()\nrequeue()\n"


class Supervised:
    """A supervisor at work on a run folder."""

    def __init__(self, folder: RunFolder, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.process = folder, process

    def wait_for(self, promise: str, timeout_s: float = 30.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while (facts := self.folder.promised(promise)) is None:
            assert time.monotonic() < deadline, f"no control/{promise}; {self.log()}"
            time.sleep(0.02)
        return facts

    def end(self) -> int:
        return self.process.wait(timeout=60)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.logs.iterdir()))


Start = Callable[..., Supervised]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(program, job=…, attempt_base=…, **plan): a supervisor whose ranks run `program`."""
    running: list[Supervised] = []

    def begin(program: str, *, job: dict[str, Any] | None = None, attempt_base: int = 0, **plan: Any) -> Supervised:
        spec = make_spec(tmp_path, job=job, **plan)
        folder = make_folder(tmp_path, spec)
        (tmp_path / "rank.py").write_text(program)
        argv = [sys.executable, "-m", "cfe_hpc.launch.supervisor", str(folder.path), "--"]
        argv += [sys.executable, "-u", str(tmp_path / "rank.py")]
        environment = {**os.environ, "CFE_RUN_DIR": str(folder.path), "CFE_ATTEMPT_BASE": str(attempt_base)}
        with open(folder.logs / "supervisor.log", "ab") as log:
            process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, start_new_session=True)
        running.append(Supervised(folder, process))
        return running[-1]

    yield begin
    for supervised in running:
        supervised.process.kill()
        supervised.process.wait()
        for path in supervised.folder.control.glob("up-*"):
            kill_quietly(json.loads(path.read_text())["pid"])


def test_ranks_get_their_place_and_their_own_logs(start: Start) -> None:
    run = start(PRELUDE + "print('hello from', rank)\ncomplete()\n", nodes=2, devices_per_node=2)
    assert run.end() == 0
    job_id = f"local-{run.process.pid}"
    place = run.wait_for("up-0-3")["environment"]
    assert float(place.pop("CFE_ALLOCATED_S")) <= time.time()
    assert place == {
        "CFE_ATTEMPT": "0",
        "CFE_ATTEMPT_BASE": "0",
        "CFE_JOB_ID": job_id,
        "CFE_LOCAL_RANK": "1",
        "CFE_LOCAL_WORLD_SIZE": "2",
        "CFE_NODE_RANK": "1",
        "CFE_NUM_NODES": "2",
        "CFE_RANK": "3",
        "CFE_RUN_DIR": str(run.folder.path),
        "CFE_WORLD_SIZE": "4",
    }
    assert (run.folder.logs / f"{job_id}.0.3.out").read_text() == "hello from 3\n"
    assert (run.folder.logs / f"{job_id}.0.3.err").read_text() == ""


def test_term_is_a_preemption_passed_on_once_and_the_run_goes_on(start: Start) -> None:
    run = start(UNTIL_TOLD, devices_per_node=2)
    run.wait_for("up-0-0"), run.wait_for("up-0-1")
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    for rank in (0, 1):
        heard = run.wait_for(f"heard-0-{rank}")
        assert heard["heard"] == ["SIGTERM"]
        assert heard["stop"]["reason"] == "preempted"
    assert run.folder.promised("up-1-0") is not None
    assert (run.folder.result() or {})["state"] == "COMPLETED"


def test_a_signal_during_start_up_waits_until_the_rank_can_hear_it(start: Start) -> None:
    slow = "import time; open('starting', 'w').close(); time.sleep(1)\n" + UNTIL_TOLD
    run = start(slow)
    while not Path(run.folder.path.parents[1] / "starting").exists():
        time.sleep(0.02)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert run.wait_for("heard-0-0")["heard"] == ["SIGTERM"]


def test_the_signal_comes_before_the_time_limit_with_its_reason(start: Start) -> None:
    run = start(UNTIL_TOLD, time_s=4.0, signal_lead_s=2)
    assert run.end() == 0
    heard = run.wait_for("heard-0-0")
    assert (heard["heard"], heard["stop"]["reason"]) == (["SIGUSR2"], "time_limit")


def test_ranks_that_ignore_the_time_limit_are_killed_and_the_run_fails(start: Start) -> None:
    run = start(PRELUDE + "while True: time.sleep(1)\n", time_s=1.0, signal_lead_s=0, kill_wait_s=0.5)
    assert run.end() == 1
    assert [event["reason"] for event in events(run.folder, "failed")] == [
        "the time limit came before the ranks had saved"
    ]
    assert (run.folder.result() or {})["state"] == "FAILED"


def test_a_preempted_run_that_could_not_save_is_started_again(start: Start) -> None:
    run = start(PRELUDE + "if attempt: complete(); sys.exit()\nwhile True: time.sleep(1)\n", kill_wait_s=0.5)
    run.wait_for("up-0-0")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert [event["event"] for event in events(run.folder, "preempted", "requeued", "failed")] == [
        "preempted",
        "requeued",
    ]


def test_usr2_is_passed_on_for_a_requeue_that_was_asked_for(start: Start) -> None:
    run = start(UNTIL_TOLD)
    run.wait_for("up-0-0")
    run.folder.promise("requeue-0", user="u")
    run.process.send_signal(signal.SIGUSR2)
    assert run.end() == 0
    assert run.wait_for("heard-0-0")["heard"] == ["SIGUSR2"]


def test_a_cancelled_run_is_never_started_again_whatever_its_ranks_promise(start: Start) -> None:
    run = start(UNTIL_TOLD)
    run.wait_for("up-0-0")
    run.folder.promise("cancel", user="u")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 1
    assert run.folder.promised("up-1-0") is None
    assert (run.folder.result() or {})["state"] == "CANCELLED"
    assert len(events(run.folder, "cancelled")) == 1


def test_when_a_rank_dies_the_others_are_ended_and_the_failure_budget_counts(start: Start) -> None:
    dies = PRELUDE + "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nwhile True: time.sleep(1)\n"
    run = start(dies, job={"recovery": {"failures": 1}}, devices_per_node=2, kill_wait_s=0.5)
    assert run.end() == 1
    assert run.folder.promised("up-1-1") is not None, "the first failure is followed by another attempt"
    assert run.folder.promised("up-2-1") is None
    assert {event["reason"] for event in events(run.folder, "failed")} == {"rank 1 was killed by SIGKILL"}
    assert (run.folder.result() or {})["state"] in ("FAILED", "HELD")


def test_ranks_that_end_well_without_a_result_are_a_failure(start: Start) -> None:
    run = start(PRELUDE)
    assert run.end() == 1
    assert [event["reason"] for event in events(run.folder, "failed")] == ["the ranks ended without a result"]


def test_a_held_run_stays_held(start: Start) -> None:
    run = start(PRELUDE + "folder.promise('held', reason='same error twice')\n")
    assert run.end() == 1
    result = run.folder.result() or {}
    assert (result["state"], result["reason"], result["attempts"]) == ("HELD", "same error twice", 1)
    # The contract's keys, whoever writes the file; what ranks that counted no step cannot know is null.
    assert {"final_step", "lost_steps", "goodput", "wall_seconds", "weights_sha256", "metrics"} <= result.keys()
    assert (result["final_step"], result["lost_steps"]) == (None, None)


def test_what_ranks_leave_behind_is_swept_up_after_the_attempt(start: Start) -> None:
    leaves = PRELUDE + (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "folder.promise('child', pid=child.pid)\ncomplete()\n"
    )
    run = start(leaves)
    assert run.end() == 0
    assert not pid_exists(run.wait_for("child")["pid"])


def test_ranks_do_not_outlive_a_supervisor_that_is_killed(start: Start) -> None:
    run = start(PRELUDE + "while True: time.sleep(1)\n", devices_per_node=2)
    pids = [run.wait_for(f"up-0-{rank}")["pid"] for rank in (0, 1)]
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 10
    while any(map(pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(pid_exists, pids))


def test_a_resubmitted_run_counts_its_attempts_on(start: Start) -> None:
    run = start(PRELUDE + "complete()\n", attempt_base=3)
    assert run.end() == 0
    assert run.folder.promised("up-3-0") is not None
