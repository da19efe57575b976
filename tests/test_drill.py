"""Drills on this machine, and the verdict on whatever a run may have done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import kill_quietly
from spine.harness import LiveRun, cfe, write_job

from cfe_hpc.cli.main import main
from cfe_hpc.launch.jobs import latest_job
from cfe_hpc.launch.verdict import Evidence, checks, times_s

NUM_RANKS = 2


def event(name: str, attempt: int = 0, second: int = 1, **fields: Any) -> dict[str, Any]:
    return {"time": f"2026-01-01T00:00:{second:02d}.000Z", "event": name, "attempt": attempt, **fields}


TOLD_S = 1767225600.0  # 2026-01-01T00:00:00Z
PASSED: list[dict[str, Any]] = [
    event("signal", step=40, reason="SIGTERM"),
    event("checkpoint_saved", second=2, step=40, seconds=0.41),
    event("requeued", second=3, step=40, reason="requeue_requested"),
    event("started", 1, second=10, detail={"allocated_s": 1767225604.5}),
    event("resumed", 1, second=11, step=40),
]
BEAT = {"time": "2026-01-01T00:00:12.500Z", "attempt": 1, "step": 41}


def evidence(events: list[dict[str, Any]], **changes: Any) -> Evidence:
    facts: dict[str, Any] = {
        "joined": True,
        "events": events,
        "first_beat": BEAT,
        "checkpoint": (NUM_RANKS, None),
        "lost_steps": 0,
    }
    return Evidence(attempt=0, told_s=TOLD_S, num_ranks=NUM_RANKS, **{**facts, **changes})


def failed(seen: Evidence) -> list[str]:
    return [check.name for check in checks(seen) if not check.ok]


def without(name: str, *others: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(each for each in PASSED if each["event"] != name), *others]


def test_a_run_that_did_everything_passes_with_its_times() -> None:
    seen = evidence(PASSED)
    assert failed(seen) == []
    expected = {"heard": 1.0, "saved": 2.0, "requeued": 3.0, "allocated": 4.5, "started": 10.0, "resumed": 11.0}
    assert times_s(seen) == {**expected, "first_step": 12.5}
    assert list(times_s(seen).values()) == sorted(times_s(seen).values())


NOTHING = evidence([], first_beat=None, checkpoint=None, lost_steps=None)
EVERYTHING = ["heard", "saved", "whole", "requeued", "started", "resumed", "went on"]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (NOTHING, EVERYTHING),
        (evidence(without("checkpoint_saved", event("checkpoint_saved", step=39))), ["saved"]),
        (evidence(without("checkpoint_saved", event("checkpoint_failed", reason="disk full"))), ["saved"]),
        (evidence(PASSED, checkpoint=(NUM_RANKS, "rank-00001.data: altered")), ["whole"]),
        (evidence(PASSED, checkpoint=(1, None)), ["whole"]),
        (evidence(without("requeued", event("requeued", step=20, reason="preempted"))), ["requeued"]),
        (evidence(without("requeued", event("held", reason="no budget"))), ["requeued"]),
        (evidence(without("resumed", event("resumed", 1, step=20))), ["resumed"]),
        (evidence(PASSED, lost_steps=3), ["went on"]),
        (evidence(PASSED[:3], first_beat=None, lost_steps=None), ["started", "resumed", "went on"]),
    ],
)
def test_what_is_missing_or_differs_fails(seen: Evidence, expected: list[str]) -> None:
    assert failed(seen) == expected


def test_why_a_run_did_not_go_back_is_told() -> None:
    seen = evidence(without("requeued", event("held", reason="preemption number 4")))
    (text,) = [check.text for check in checks(seen) if check.name == "requeued"]
    assert text == "the run did not go back to the queue: held (preemption number 4)"


def test_of_a_program_that_never_joined_nothing_is_asked_that_cannot_be_known() -> None:
    events = [event("signal", reason="SIGTERM"), event("requeued", reason="requeue_requested"), event("started", 1)]
    seen = evidence(events, joined=False, first_beat=None, checkpoint=None, lost_steps=None)
    assert [(check.name, check.ok) for check in checks(seen)] == [
        ("heard", True),
        ("requeued", True),
        ("started", True),
    ]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[LiveRun]:
    """A run of one rank on this machine, past its first steps; it needs no torch."""
    job = write_job(
        tmp_path,
        name="d",
        entry="entries:counting",
        resources={"devices_per_node": 1},
        params={"steps": 3000, "pause_s": 0.05, "variant": "a"},
    )
    live = LiveRun.submit(job, "local", cwd=tmp_path, env=os.environ)
    try:
        live.wait_step(2, attempt=0)
        yield live
    finally:
        job_record = latest_job(live.folder)
        assert job_record is not None
        kill_quietly(job_record["pid"])


def test_drills_on_this_machine(run: LiveRun) -> None:
    done = cfe("drill", run.run_id, "--timeout", "60s", cwd=run.cwd, env=run.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{run.run_id}: the drill of attempt 0 passed"
    # The rank alone, as where signals reach no further than the scheduler's own children.
    done = cfe("drill", run.run_id, "--direct", "--json", "--timeout", "60s", cwd=run.cwd, env=run.env)
    report = json.loads(done.stdout)
    assert (done.returncode, report["passed"], report["attempt"], report["direct"]) == (0, True, 1, True), report
    assert [each["reason"] for each in run.events("requeued")] == ["preempted", "preempted"]
    assert sorted(path.name for path in run.folder.control.glob("drill-*")) == ["drill-0", "drill-1"]
    cfe("cancel", run.run_id, cwd=run.cwd, env=run.env)
    run.wait(run.folder.result, 30, "ended")
    done = cfe("drill", run.run_id, cwd=run.cwd, env=run.env)
    assert done.returncode == 2
    assert "is not running (CANCELLED); a drill needs a run that trains" in done.stderr


def test_a_time_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "any", "--timeout", "soon"]) == 2
    assert capsys.readouterr().err.startswith("error: --timeout: not a duration")
