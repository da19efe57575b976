"""The end of an attempt, without a scheduler: who waits, who goes on, and what is said when a rank leaves early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_disks import mounted
from launching import events, make_folder, make_spec

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.devices.resolve import resolve
from cfe_hpc.errors import SchedulerError
from cfe_hpc.launch.jobs import unused_attempt
from cfe_hpc.ranks import stopping
from cfe_hpc.ranks.bootstrap import Place
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.epilogue import close_failed_attempt
from cfe_hpc.ranks.rendezvous import Meeting
from cfe_hpc.ranks.run import Run
from cfe_hpc.ranks.scheduler import Cause, JobRecord
from cfe_hpc.ranks.signals import StopFlag
from cfe_hpc.ranks.stopping import Inquiry, conclude, hold
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder

RANK = {"CFE_RANK": "0", "CFE_LOCAL_RANK": "0", "CFE_WORLD_SIZE": "1", "CFE_LOCAL_WORLD_SIZE": "1", "CFE_ATTEMPT": "0"}


class Answers:
    """A scheduler that gives the answers it was given, the last one for ever, and refuses so many requeues."""

    def __init__(self, *causes: Cause, refusals: int = 0) -> None:
        self._causes = list(causes)
        self._refusals = refusals
        self.requeues = 0

    def why(self, signals: list[str]) -> tuple[Cause, str]:
        cause = self._causes.pop(0) if len(self._causes) > 1 else self._causes[0]
        return cause, "as the test says"

    def stopping_already(self) -> bool:
        return False

    def requeue(self, *, next_attempt: int) -> str:
        self.requeues += 1
        if self.requeues <= self._refusals:
            raise SchedulerError("scontrol: refused")
        return "requeued"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_RETRY_S", 0.01)
    monkeypatch.setattr(stopping, "_KILL_MARGIN_S", 0.0)


def end(folder: RunFolder, scheduler: Answers, **spec: Any) -> stopping.Verdict:
    frozen = make_spec(folder.path, **spec)
    inquiry = Inquiry(scheduler, ["SIGTERM"], frozen)
    return conclude(folder, scheduler, frozen, SoloGroup(), inquiry=inquiry, attempt=0, step=5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return make_folder(tmp_path, make_spec(tmp_path))


def test_a_silent_scheduler_is_asked_again(folder: RunFolder) -> None:
    scheduler = Answers("unknown", "unknown", "preempted")
    assert end(folder, scheduler).action == "requeued"
    assert scheduler.requeues == 1


def test_a_requeue_that_fails_is_tried_again_and_written_down_once(folder: RunFolder) -> None:
    scheduler = Answers("requeue_requested", refusals=3)
    assert end(folder, scheduler).action == "requeued"
    assert scheduler.requeues == 4
    assert [event["step"] for event in events(folder, "requeued")] == [5]


@pytest.mark.parametrize("cause", ["preempted", "requeue_requested", "time_limit"])
def test_a_run_that_cannot_be_requeued_is_held(folder: RunFolder, cause: Cause) -> None:
    verdict = end(folder, Answers(cause, refusals=10**9), kill_wait_s=0.1, signal_lead_s=0)
    assert (verdict.action, verdict.exit_code) == ("held", 1)
    assert "scontrol: refused" in (folder.promised("held") or {})["reason"]


def test_a_requeue_follows_though_nothing_can_be_written(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Answers("preempted")
    with mounted(folder.path, "-t", "tmpfs", "-o", "size=64k", "tmpfs") as disk:
        folder.control.mkdir()
        folder.append_event("started", attempt=0)
        folder.events_path.unlink()
        disk.fill()
        assert end(folder, scheduler).action == "requeued"
        hold(folder, attempt=0, step=None, why="as the test says")
        write_result(folder, "HELD", attempts=1)
        assert list(folder.control.iterdir()) == [] and folder.result() is None
    assert scheduler.requeues == 1
    told = [record.getMessage().partition(": ")[0] for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "the event preempted is lost",
        "another attempt follows, but that cannot be noted",
        "the event requeued is lost",
        "the run is held, but that cannot be noted",
        "the event held is lost",
        "how the run ended (HELD) is lost",
    ]


def test_a_second_promise_of_the_same_attempt_asks_for_nothing(folder: RunFolder) -> None:
    folder.promise("requeued-0", reason="preempted")
    scheduler = Answers("preempted")
    assert end(folder, scheduler).action == "requeued"
    assert (scheduler.requeues, events(folder, "requeued")) == (0, [])


def test_a_program_that_has_ended_for_an_unknown_reason_is_held_not_requeued(folder: RunFolder) -> None:
    scheduler = Answers("unknown")
    assert end(folder, scheduler, kill_wait_s=0.05).action == "held"
    assert scheduler.requeues == 0


class Count:
    total = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def test_a_run_that_nobody_tells_why_and_nobody_kills_goes_on(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, kill_wait_s=0.05)
    folder = make_folder(tmp_path, spec)
    meeting = Meeting(address="127.0.0.1", master_port=0, control_port=0)
    place = Place(facts=read_facts(RANK), meeting=meeting, device=resolve("cpu").device, group=SoloGroup())
    flag = StopFlag()
    run = Run(folder, spec, place, flag)
    run._scheduler = Answers("unknown")
    count = Count()
    run.track(count=count)
    for step in run.steps(6):
        count.total += step
        run.log(total=count.total)
        if step == 1:
            flag.set(15)
        if step == 3:
            flag.set(15)
            run.check_stop()
    result = folder.result() or {}
    assert (result["state"], result["final_step"], result["metrics"]["total"]) == ("COMPLETED", 6, 15)
    assert [event["step"] for event in events(folder, "signal")] == [2, 4]
    assert [event["step"] for event in events(folder, "checkpoint_saved")] == [2, 4, 6]


def run_rank(folder: RunFolder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cfe_hpc.ranks", str(folder.path)],
        env={**os.environ, **RANK, "CFE_JOB_ID": "local-1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_script_that_leaves_with_a_bad_status_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\n\ndef early(run):\n    sys.exit('no such corpus')\n")
    folder = make_folder(tmp_path, make_spec(tmp_path, job={"command": None, "entry": "leaves:early"}))
    assert run_rank(folder).returncode == 1
    assert [event["reason"] for event in events(folder, "failed")] == ["SystemExit: no such corpus"]


@pytest.mark.parametrize(("promise", "code", "state"), [("cancel", 0, "CANCELLED"), ("held", 1, None)])
def test_no_attempt_begins_of_a_run_that_is_cancelled_or_held(
    tmp_path: Path, promise: str, code: int, state: str | None
) -> None:
    folder = make_folder(tmp_path, make_spec(tmp_path, job={"command": ["touch", str(tmp_path / "began")]}))
    folder.promise(promise, reason="as the test says")
    assert run_rank(folder).returncode == code
    assert not (tmp_path / "began").exists()
    assert (folder.result() or {}).get("state") == state


def test_an_attempt_number_is_not_used_again_though_it_never_started(folder: RunFolder) -> None:
    assert unused_attempt(folder) == 0
    folder.append_event("started", attempt=0)
    folder.append_event("failed", attempt=1, reason="died before it started")
    assert unused_attempt(folder) == 2


def test_a_path_that_looks_like_a_field_changes_no_record() -> None:
    shown = "JobState=RUNNING PreemptTime=None Restarts=1 WorkDir=/data/a Restarts=9 PreemptTime=2026-01-01T00:00:00/x"
    record = JobRecord.parse(shown)
    assert (record.restarts, record.preempt_time) == (1, None)


def test_an_attempt_fails_of_what_came_after_the_last_restart_inside_it(folder: RunFolder) -> None:
    folder.append_event("started", attempt=0, detail={"total_steps": 9})
    folder.append_event("checkpoint_saved", attempt=0, step=5)
    folder.append_event("failed", attempt=0, rank=0, cause="configuration", reason="ImportError: for a moment")
    folder.append_event("started", attempt=0, detail={"total_steps": 9, "restart": 1})
    folder.append_event("failed", attempt=0, rank=1, cause="hang", reason="no step for 9 s")
    assert close_failed_attempt(folder, attempt=0, status=1)
    (requeued,) = events(folder, "requeued")
    assert requeued["reason"] == "hang"


def test_a_hold_tells_the_line_of_the_log_that_says_why(folder: RunFolder) -> None:
    (folder.logs / "41.0.3.err").write_text("OSError: [Errno 28] No space left on device: '/x'\nbye\n")
    folder.append_event(
        "failed", attempt=0, rank=3, cause="disk_full", reason="RuntimeError: the index was not written"
    )
    assert not close_failed_attempt(folder, attempt=0, status=1)
    (held,) = events(folder, "held")
    line = "OSError: [Errno 28] No space left on device: '/x'"
    assert (held["cause"], held["detail"]) == ("disk_full", {"log": "logs/41.0.3.err", "line": line})
    why = "full disk number 1; the job allows 0 (recovery.disk_fulls): RuntimeError: the index was not written"
    assert (folder.result() or {})["reason"] == held["reason"] == f"{why}; logs/41.0.3.err: {line}"


def test_the_batch_script_holds_what_the_ranks_had_no_time_to_hold(folder: RunFolder) -> None:
    folder.promise("held", reason="two preemptions")
    done = subprocess.run(
        [sys.executable, "-m", "cfe_hpc.ranks.epilogue", str(folder.path), "1"],
        env={**os.environ, "SLURM_JOB_ID": "41"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0
    result = json.loads(folder.result_path.read_text())
    assert (result["state"], result["reason"]) == ("HELD", "two preemptions")
