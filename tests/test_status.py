"""`status` on run folders as ranks and schedulers leave them; squeue is a script, the rest is real."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_specs import run_spec

from cfe_hpc.cli.main import main
from cfe_hpc.launch.local import start_ticks
from cfe_hpc.runfolder import RunFolder

KEYS = ["run_id", "state", "job_id", "attempt", "step", "total_steps", "lost_steps", "goodput", "heartbeat_age_s"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runs root of the default site, in the current folder."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    root.mkdir()
    return root


def make_run(root: Path, number: int = 0, *, job: dict[str, Any] | None = None) -> RunFolder:
    folder = RunFolder(root / "toy" / f"toy-20260131-2359{number:02d}-abcd")
    for path in (folder.logs, folder.checkpoints, folder.control):
        path.mkdir(parents=True)
    run_spec(run_id=folder.run_id).write(folder.run_toml)
    if job is not None:
        folder.promise("job", attempt_base=0, **job)
    return folder


def slurm_job(number: int) -> dict[str, Any]:
    return {"job_id": str(number), "scheduler": "slurm"}


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, printed: str, status: int = 0) -> Path:
    """An squeue that prints `printed` and notes its arguments, one call a line."""
    programs = folder / "bin"
    programs.mkdir()
    calls = folder / "squeue-calls"
    script = f'#!/bin/sh\nprintf "%s\\n" "$*" >> {calls}\ncat <<"END"\n{printed}END\nexit {status}\n'
    (programs / "squeue").write_text(script)
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return calls


def status(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(["status", "--json", *words]) == code
    shown: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return shown


def started(folder: RunFolder, attempt: int, job_id: str) -> None:
    detail = {"job_id": job_id, "total_steps": 40}
    folder.append_event("started", attempt=attempt, host=socket.gethostname(), detail=detail)


def beat(folder: RunFolder, attempt: int, step: int, time: str = "2026-01-31T10:00:00.000Z") -> None:
    with open(folder.heartbeat_path, "a") as stream:
        stream.write(json.dumps({"time": time, "attempt": attempt, "step": step, "step_seconds": 0.5}) + "\n")


def test_keys_and_figures_of_a_run_that_has_ended(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(runs, job=slurm_job(41))
    started(folder, 0, "41")
    started(folder, 1, "41")
    beat(folder, 1, 40)
    folder.write_result({"state": "COMPLETED", "final_step": 40, "lost_steps": 3, "goodput": 0.75})
    (only,) = status(capsys)
    assert list(only)[: len(KEYS)] == KEYS
    assert only.pop("heartbeat_age_s") > 0
    assert only == {
        "run_id": folder.run_id,
        "state": "COMPLETED",
        "job_id": "41",
        "attempt": 1,
        "step": 40,
        "total_steps": 40,
        "lost_steps": 3,
        "goodput": 0.75,
        "reason": "",
        "run_dir": str(folder.path),
        "buckets": {},
    }


def test_one_question_for_all_runs_and_none_for_those_that_have_ended(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = "41|PENDING|N/A||Priority\n42|RUNNING|2026-01-31T10:00:00|n1|None\n43|PENDING|N/A||JobHeldUser\n"
    printed += "44|CANCELLED|N/A||None\n45|NODE_FAIL|2026-01-31T10:00:00|n1|NodeDown\n"
    calls = fake_squeue(tmp_path, monkeypatch, printed)
    for number in range(41, 48):
        make_run(runs, number, job=slurm_job(number))
    ended = make_run(runs, 48, job=slurm_job(48))
    ended.write_result({"state": "FAILED", "reason": "ValueError: x"})
    held = make_run(runs, 49, job=slurm_job(49))
    held.promise("held", reason="the same first error twice: x")
    make_run(runs, 50, job=slurm_job(51)).promise("cancel", user="me")
    shown = [(one["job_id"], one["state"], one["reason"]) for one in status(capsys)]
    assert shown == [
        ("41", "PENDING", "Priority"),
        ("42", "RUNNING", ""),
        ("43", "HELD", "JobHeldUser"),
        ("44", "CANCELLED", ""),
        ("45", "FAILED", "NodeDown, and left no result"),
        ("46", "FAILED", "vanished: the scheduler no longer knows job 46, and left no result"),
        ("47", "FAILED", "vanished: the scheduler no longer knows job 47, and left no result"),
        ("48", "FAILED", "ValueError: x"),
        ("49", "HELD", "the same first error twice: x"),
        ("51", "CANCELLED", "vanished: the scheduler no longer knows job 51"),
    ]
    (call,) = calls.read_text().splitlines()
    assert "--jobs=41,42,43,44,45,46,47,51 " in call


def test_the_newest_job_of_a_run_is_the_one_asked_about(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_squeue(tmp_path, monkeypatch, "42|PENDING|N/A||BeginTime\n")
    folder = make_run(runs, job=slurm_job(41))
    folder.promise("job-1", job_id="42", scheduler="slurm", attempt_base=1)
    started(folder, 0, "41")
    (only,) = status(capsys)
    assert (only["job_id"], only["state"], only["attempt"]) == ("42", "PENDING", 0)


def test_a_silent_scheduler_is_an_error_and_the_folders_still_speak(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_squeue(tmp_path, monkeypatch, "", status=1)
    training = make_run(runs, 1, job=slurm_job(41))
    started(training, 0, "41")
    beat(training, 0, 7)
    make_run(runs, 2, job=slurm_job(42))
    assert main(["status", "--json"]) == 3
    out, err = capsys.readouterr()
    assert [(one["state"], one["step"]) for one in json.loads(out)] == [("RUNNING", 7), ("PENDING", None)]
    assert err.startswith("error: squeue: gave no answer") and err.count("\n") == 1


def test_lost_steps_and_goodput_of_a_running_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_squeue(tmp_path, monkeypatch, "41|RUNNING|N/A|n1|None\n")
    folder = make_run(runs, job=slurm_job(41))
    started(folder, 0, "41")
    for step in range(1, 9):
        beat(folder, 0, step)
    started(folder, 1, "41")
    folder.append_event("resumed", attempt=1, step=5)
    beat(folder, 1, 6)
    (only,) = status(capsys)
    assert (only["attempt"], only["step"], only["lost_steps"]) == (1, 6, 3)


def test_a_local_run_lives_as_long_as_its_supervisor(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        job = {"job_id": f"local-{sleeper.pid}", "scheduler": "local", "pid": sleeper.pid}
        make_run(runs, job={**job, "start_ticks": start_ticks(sleeper.pid), "host": socket.gethostname()})
        assert [one["state"] for one in status(capsys)] == ["RUNNING"]
    finally:
        sleeper.kill()
        sleeper.communicate()
    (only,) = status(capsys)
    assert only["state"] == "FAILED" and only["reason"].startswith("vanished")


def test_runs_started_by_hand(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(make_run(runs, 1), 0, f"alone-{os.getpid()}")
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    started(make_run(runs, 2), 0, f"alone-{gone.pid}")
    make_run(runs, 3)
    assert [one["state"] for one in status(capsys)] == ["RUNNING", "FAILED", "FAILED"]


def test_the_heartbeat_age_is_read_past_a_torn_last_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(runs)
    folder.write_result({"state": "COMPLETED"})
    beat(folder, 0, 1, time="2001-01-01T00:00:00.000Z")
    with open(folder.heartbeat_path, "a") as stream:
        stream.write('{"time":"2026-01-3')
    (only,) = status(capsys)
    assert only["heartbeat_age_s"] > 20 * 365 * 86_400


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(runs, job=slurm_job(41))
    started(folder, 0, "41")
    folder.write_result({"state": "FAILED", "reason": "a\nb", "final_step": 9, "lost_steps": 0, "goodput": 0.5})
    assert main(["status", folder.run_id[:6]]) == 0
    assert capsys.readouterr().out == (
        "RUN                       STATE   JOB  ATTEMPT  STEP  LOST  GOODPUT  HEARTBEAT  REASON\n"
        "toy-20260131-235900-abcd  FAILED  41   0        9/40  0     50.0%    -          a\n"
    )


def test_the_table_of_one_run_tells_where_its_time_went(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(runs, job=slurm_job(41))
    buckets = {"queue": 12.34, "startup": 2.0, "restore": 0.0, "steps": 7.0, "lost": 1.0}
    folder.write_result({"state": "COMPLETED", "final_step": 9, "lost_steps": 0, "goodput": 0.7, "buckets": buckets})
    assert main(["status", folder.run_id]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "",
        "TIME           SECONDS  OF ALLOCATED",
        "queue             12.3",
        "startup            2.0         20.0%",
        "steps              7.0         70.0%",
        "lost               1.0         10.0%",
        "allocated         10.0        100.0%",
    ]
    assert main(["status"]) == 0
    assert "TIME" not in capsys.readouterr().out
    assert status(capsys)[0]["buckets"] == buckets


def test_no_runs_is_no_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(capsys) == []
    assert main(["status"]) == 0
    assert capsys.readouterr().out.startswith("no runs here")


def test_an_unknown_run_is_a_usage_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "nothing-like-it"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing-like-it: no such run")


@pytest.mark.skipif(shutil.which("squeue") is None, reason="squeue is installed")
def test_a_real_squeue_without_a_cluster_is_exit_code_3(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm.conf").touch()  # a missing one makes squeue try again for a minute
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    make_run(runs, job=slurm_job(41))
    assert main(["status"]) == 3
    assert capsys.readouterr().err.startswith("error: squeue")
