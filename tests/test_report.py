"""`report`: attempts, where their time went, and what went wrong, from a folder as ranks leave it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_events import write_run
from test_ledger import ended, line, said, started
from test_status import make_run, runs, slurm_job

from cfe_hpc.cli.main import main
from cfe_hpc.runfolder import RunFolder

__all__ = ["runs"]


@pytest.fixture
def folder(runs: Path) -> RunFolder:
    """A run that failed once with a hostile message, was preempted once, and completed."""
    folder = make_run(runs, job=slurm_job(41))
    events = [
        said("submitted", 0, 0) | {"attempt": None},
        started(0, 12, allocated=10),
        said("failed", 0, 30, rank=1, host="n1", reason="ValueError: a|b\nc", cause="data", step=8),
        said("requeued", 0, 31, reason="data"),
        started(1, 42, allocated=40),
        said("resumed", 1, 43, step=5, seconds=1.0),
        said("degraded", 1, 44, reason="fewer_nodes", detail={"nodes": 1}),
        said("signal", 1, 50, step=9),
        said("checkpoint_saved", 1, 52, step=9, seconds=2.0),
        said("requeued", 1, 53, reason="preempted", step=9),
    ]
    beats = [line(0, 8, 20, startup=2.0, step=8.0), line(1, 9, 50, startup=2.0, restore=1.0, step=7.0)]
    write_run(folder.path, events, beats)
    ended(folder, 0, 32)
    ended(folder, 1, 55)
    measured = {"step_p95_s": 1.0, "save_p95_s": 2.0, "blocked_p95_s": 0.5, "interruptions": 2, "trained_s": 15.0}
    result: dict[str, Any] = {"state": "COMPLETED", "final_step": 9, "lost_steps": 3, "goodput": 0.3243}
    buckets = {"queue": 18.0, "startup": 4.0, "restore": 1.0, "steps": 12.0, "lost": 13.0, "checkpoint": 2.0}
    folder.write_result({**result, "buckets": {**buckets, "shutdown": 5.0}, "measured": measured})
    return folder


def test_the_report_in_markdown(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", folder.run_id]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"# {folder.run_id}\n\n- state: COMPLETED\n- job: 41\n- steps: 9 of 100, lost: 3\n")
    assert "| 0 |  | 21.0 | 0 to 8 | 3 | data error | ValueError: a\\|b c |" in text
    assert "| 1 |  | 13.0 | 5 to 9 | 0 | preemption |  |" in text
    assert "|  | queue | startup | restore | steps | lost | checkpoint | shutdown |" in text
    assert "| attempt 0 |  | 2.0 | 0.0 | 5.0 | 13.0 | 0.0 | 1.0 |" in text
    assert "| of allocated |  | 10.8% | 2.7% | 32.4% | 35.1% | 5.4% | 13.5% |" in text
    assert "- save, p95: 2 s; training waited 0.5 s of them" in text
    assert "| 1 | degraded |  |  | fewer_nodes: nodes 1 |" in text
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} <= {7, 8, 9}


def test_the_report_as_json(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json", folder.run_id, str(folder.path)]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second
    assert (first["run_id"], first["state"], first["goodput"]) == (folder.run_id, "COMPLETED", 0.3243)
    assert [attempt["ended_by"] for attempt in first["attempts"]] == ["data", "preempted"]
    assert [sum(attempt["buckets"].values()) for attempt in first["attempts"]] == [21.0, 13.0]
    assert [event["event"] for event in first["events"]] == ["failed", "degraded"]


def test_the_report_of_a_run_that_never_started(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", make_run(runs).run_id]) == 0
    text = capsys.readouterr().out
    assert "- steps: none, lost: 0\n- goodput: not known\n" in text
    assert "Where the time went" not in text
