"""How long a stop takes, from what a run has seen; the numbers are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_events import beat, stamp, write_run
from run_specs import run_spec

from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Preemption
from cfe_hpc.metrics.exporter import NullExporter
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.journal import Journal
from cfe_hpc.ranks.scheduler import TIMER
from cfe_hpc.ranks.timer import TIMER_BIT, StopTimer, names
from cfe_hpc.recovery import lead
from cfe_hpc.recovery.measured import Measured, need_s, save_interval_s, signal_lead_s
from cfe_hpc.runfolder import RunFolder


def measured(**changes: Any) -> Measured:
    facts: dict[str, Any] = {
        "step_p95_s": 2.0,
        "save_p95_s": 30.0,
        "blocked_p95_s": 8.0,
        "interruptions": 4,
        "trained_s": 14_400.0,
    }
    return Measured(**{**facts, **changes})


def test_young_and_daly() -> None:
    assert save_interval_s(measured()) == 240.0  # sqrt(2 * 8 * 3600)
    assert save_interval_s(measured(interruptions=0)) == 480.0  # nothing happened yet: as if just now
    assert save_interval_s(measured(trained_s=40.0)) == 16.0  # half of the time at the most


def test_what_a_stop_needs() -> None:
    assert need_s(measured()) == 32.0
    assert signal_lead_s(measured(step_p95_s=2.3)) == 93


def test_measured_is_the_95th_of_100(tmp_path: Path) -> None:
    events = [{"event": "started", "attempt": 0, "time": stamp(10)}]
    events += [
        {
            "event": "checkpoint_saved",
            "attempt": 0,
            "step": n,
            "time": stamp(20),
            "seconds": n,
            "blocked_seconds": n / 2,
        }
        for n in range(1, 21)
    ]
    events += [{"event": "checkpoint_saved", "attempt": 0, "step": 21, "detail": "brought from where it was complete"}]
    beats = [beat(0, n, 20, seconds=n / 10) for n in range(1, 101)]
    found = lead.measure(write_run(tmp_path, events, beats))
    assert found == Measured(step_p95_s=9.5, save_p95_s=19.0, blocked_p95_s=9.5, interruptions=0, trained_s=10.0)


def test_saves_that_do_not_say_for_how_long_training_waited_made_it_wait_throughout(tmp_path: Path) -> None:
    events = [{"event": "checkpoint_saved", "attempt": 0, "step": 1, "time": stamp(20), "seconds": 3.0}]
    found = lead.measure(write_run(tmp_path, events, [beat(0, 1, 1)]))
    assert found is not None and found.blocked_p95_s == 3.0


def test_nothing_is_measured_without_a_step_and_a_save(tmp_path: Path) -> None:
    assert lead.measure(RunFolder(tmp_path)) is None
    assert lead.measure(write_run(tmp_path, [], [beat(0, 1, 1)])) is None


def test_interruptions_are_ends_that_nobody_asked_for_or_knew_of(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    for number, reason in enumerate(["preempted", "time_limit", "requeue_requested", "node_failure", "hang"]):
        events += [
            {"event": "started", "attempt": number, "time": stamp(100 * number)},
            {"event": "checkpoint_saved", "attempt": number, "step": number + 1, "seconds": 1, "time": stamp(0)},
            {"event": "requeued", "attempt": number, "reason": reason, "time": stamp(100 * number + 50)},
        ]
    events += [{"event": "started", "attempt": 5, "time": stamp(600)}]
    found = lead.measure(write_run(tmp_path, events, [beat(5, 9, 625)]))
    assert found is not None and (found.interruptions, found.trained_s) == (3, 275.0)


def local_plan(**changes: Any) -> Plan:
    return run_spec().plan.model_copy(update=changes)


def supervised(monkeypatch: pytest.MonkeyPatch, allocated_s: float) -> Any:
    monkeypatch.setenv("CFE_ALLOCATED_S", str(allocated_s))
    return read_facts({"CFE_RANK": "0", "CFE_LOCAL_RANK": "0", "CFE_WORLD_SIZE": "1", "CFE_LOCAL_WORLD_SIZE": "1"})


def test_the_timer_rings_once_where_the_planned_lead_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr("cfe_hpc.ranks.timer.time.time", lambda: now_s[0])
    timer = StopTimer(supervised(monkeypatch, 1000.0), local_plan(time_s=100.0, signal_lead_s=30))
    timer.need(20.0)
    now_s[0] = 1099.0
    assert not timer.due()  # 30 s are enough for 20 s and a margin of 10 s: the signal does it
    timer.need(25.0)
    now_s[0] = 1064.9
    assert not timer.due()
    now_s[0] = 1065.0
    assert timer.due()
    assert not timer.due()


def test_no_timer_without_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = StopTimer(supervised(monkeypatch, 1000.0), local_plan(time_s=None, signal_lead_s=0))
    timer.need(1e9)
    assert not timer.due()


def test_the_timers_bit_has_a_name_of_its_own() -> None:
    assert names(TIMER_BIT | 1) == ["SIGTERM", TIMER]


def journal_of(folder: Path, *, grace: float, **recovery: Any) -> Journal:
    spec = run_spec(recovery=recovery)
    preemption = Preemption(mode="requeue", grace=grace)
    spec = spec.model_copy(update={"plan": spec.plan.model_copy(update={"preemption": preemption})})
    return Journal(RunFolder(folder), spec, read_facts({}), NullExporter())


def degraded(folder: Path) -> list[dict[str, Any]]:
    return [event for event in RunFolder(folder).events() if event["event"] == "degraded"]


def train(journal: Journal, *, saves: int) -> None:
    journal.started(100)
    for step in range(1, saves + 1):
        journal.step_begins()
        for done in range(10 * step - 9, 10 * step + 1):
            journal.step_ends(done)
        journal.saved(10 * step, seconds=30.0, blocked_seconds=8.0, name="x")


def test_a_grace_too_short_for_a_save_is_told_once_and_saves_come_more_often(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, grace=20.0)
    train(journal, saves=3)
    assert [event["reason"] for event in degraded(tmp_path)] == ["grace_too_short", "saves_more_often"]
    assert journal.save_every_s == 16.0  # twice what a save costs: hardly any time was trained
    assert "20 s" in degraded(tmp_path)[0]["detail"]


def test_saves_stay_as_they_are_where_the_job_says_so_or_the_grace_holds_one(tmp_path: Path) -> None:
    for name, settings in {"fixed": {"grace": 20.0, "adapt_saves": False}, "long": {"grace": 60.0}}.items():
        (tmp_path / name).mkdir()
        journal = journal_of(tmp_path / name, **settings)
        train(journal, saves=2)
        assert journal.save_every_s is None
    assert [event["reason"] for event in degraded(tmp_path / "fixed")] == ["grace_too_short"]
    assert degraded(tmp_path / "long") == []


def test_a_line_that_cannot_be_written_leaves_its_time_to_the_next(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, grace=60.0)
    journal.started(100)
    (tmp_path / "heartbeat.ndjson").mkdir()
    journal.step_begins()
    journal.step_ends(10)
    (tmp_path / "heartbeat.ndjson").rmdir()
    journal.step_ends(20)
    (line,) = [json.loads(text) for text in (tmp_path / "heartbeat.ndjson").read_text().splitlines()]
    assert line["step"] == 20
    assert line["spent"]["startup"] > 0
    assert line["step_seconds"] == pytest.approx(line["spent"]["step"] / 2, abs=1e-6)
