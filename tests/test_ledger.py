"""Where the allocated time went: every second of every attempt in one bucket, whatever became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_events import ZERO, Events, attempt, beat, line, stamp, started, write_run

from cfe_hpc.recovery.buckets import BUCKETS
from cfe_hpc.recovery.ledger import Summary, summarise
from cfe_hpc.recovery.result import close_books, write_result
from cfe_hpc.runfolder import RunFolder


def said(event: str, number: int, at: float, **fields: Any) -> dict[str, Any]:
    return {"event": event, "attempt": number, "time": stamp(at), **fields}


def ended(folder: RunFolder, number: int, at: float) -> None:
    folder.control.mkdir(exist_ok=True)
    (folder.control / f"ended-{number}").write_text(json.dumps({"time": stamp(at), "status": 0}))


def used(summary: Summary) -> dict[str, float]:
    """The buckets that hold anything; all of them together are the time from submission to the end."""
    assert list(summary.buckets) == list(BUCKETS)
    assert sum(summary.buckets.values()) == pytest.approx(summary.wall_seconds, abs=0.01)
    assert sum(summary.buckets.values()) - summary.buckets["queue"] == pytest.approx(
        summary.allocated_seconds, abs=0.01
    )
    return {bucket: seconds for bucket, seconds in summary.buckets.items() if seconds}


def test_a_preemption_between_two_attempts(tmp_path: Path) -> None:
    """Attempt 0 has its nodes from 10 to 34, when it is requeued, attempt 1 from 60 to 90; nothing is lost."""
    events: Events = [
        {"event": "submitted", "time": stamp(0)},
        started(0, 14, allocated=10),
        said("signal", 0, 30, step=10),
        said("checkpoint_saved", 0, 33, step=10, seconds=3.0),
        said("requeued", 0, 34, step=10, reason="preempted"),
        started(1, 65, allocated=60, startup=4.0),
        said("resumed", 1, 67, step=10, seconds=2.0),
        said("completed", 1, 88, step=20),
        said("checkpoint_saved", 1, 86, step=20, seconds=2.0),
    ]
    beats = [
        line(0, 5, 20, startup=2.0, step=5.0, data=1.0),
        line(0, 10, 30, step=8.0, checkpoint=2.0),
        line(1, 20, 84, startup=4.0, restore=2.0, step=16.0, evaluation=1.0),
    ]
    folder = write_run(tmp_path, events, beats)
    ended(folder, 0, 40)
    ended(folder, 1, 90)
    summary = summarise(folder)
    assert used(summary) == {
        "queue": 36.0,
        "startup": 4.0 + 5.0,
        "restore": 2.0,
        "steps": 29.0,
        "checkpoint": 2.0 + 3.0 + 2.0,
        "evaluation": 1.0,
        "data": 1.0,
        "shutdown": 1.0 + 4.0,
    }
    assert (summary.goodput, summary.lost_steps) == (round(29 / 54, 4), 0)


def test_steps_done_twice_and_what_came_after_the_last_line_are_lost(tmp_path: Path) -> None:
    """Killed at 25 after step 10, saved at 6: of 9 s in steps 4 to 10, 4 of 7 are lost, and the 5 s after them."""
    events: Events = [
        started(0, 2, allocated=0),
        said("checkpoint_saved", 0, 11, step=6, seconds=1.0),
        said("failed", 0, 25, reason="rank 1 was killed", rank=1),
        said("requeued", 0, 26, reason="failed"),
        started(1, 42, allocated=40),
        said("resumed", 1, 43, step=6, seconds=1.0),
    ]
    beats = [
        line(0, 3, 9, startup=2.0, step=7.0),
        line(0, 10, 20, step=10.5, checkpoint=0.5),
        line(1, 12, 55, startup=2.0, restore=1.0, step=12.0),
    ]
    folder = write_run(tmp_path, events, beats)
    ended(folder, 0, 28)
    assert used(summarise(folder)) == {
        "queue": 14.0,
        "startup": 4.0,
        "restore": 1.0,
        "steps": 7.0 + 10.5 * 3 / 7 + 12.0,
        "lost": 10.5 * 4 / 7 + 5.0,
        "checkpoint": 0.5,
        "shutdown": 1.0,
    }
    assert summarise(folder).lost_steps == 4


def test_a_checkpoint_that_no_attempt_resumes_from_saves_nothing(tmp_path: Path) -> None:
    """Attempt 2 goes back to step 5, behind what attempt 1 resumed from: of attempt 0, too, only 5 steps count."""
    events: Events = []
    beats = []
    for number, (start, end) in enumerate([(0, 10), (8, 9), (5, 12)]):
        at = 100 * number
        events += [started(number, at + 2, allocated=at), said("resumed", number, at + 2, step=start)]
        beats.append(line(number, end, at + 2 + end - start, startup=2.0, step=end - start))
    summary = summarise(write_run(tmp_path, events, beats))
    assert summary.lost_steps == 5 + 1
    assert used(summary) == {"queue": 185.0, "startup": 6.0, "steps": 5.0 + 7.0, "lost": 5.0 + 1.0}


def test_a_roll_back_loses_the_steps_that_it_undoes(tmp_path: Path) -> None:
    events: Events = [
        started(0, 2, allocated=0),
        said("checkpoint_saved", 0, 12, step=10, seconds=0.0),
        said("rolled_back", 0, 20, step=10, reason="nan", detail={"bad_step": 15, "undone": 5}),
        said("signal", 0, 27, step=14),
        said("checkpoint_saved", 0, 28, step=14, seconds=1.0),
        said("requeued", 0, 28, reason="time_limit"),
    ]
    beats = [
        line(0, 10, 12, startup=2.0, step=10.0),
        line(0, 15, 18, step=5.5, data=0.5),
        line(0, 14, 27, restore=3.0, step=6.0),
    ]
    summary = summarise(write_run(tmp_path, events, beats))
    assert (summary.lost_steps, summary.last_step) == (5, 14)
    assert used(summary) == {
        "startup": 2.0,
        "restore": 3.0,
        "steps": 16.0,
        "lost": 5.5,
        "checkpoint": 1.0,
        "data": 0.5,
    }


def test_a_restart_inside_the_allocation_is_the_same_attempt(tmp_path: Path) -> None:
    events: Events = [
        started(0, 3, allocated=0),
        said("failed", 0, 10, reason="ValueError: x"),
        started(0, 15, allocated=0, startup=2.0, restart=1),
        said("resumed", 0, 16, step=4),
        said("completed", 0, 30, step=14),
    ]
    beats = [line(0, 6, 9, startup=2.0, step=6.0), line(0, 14, 29, startup=2.0, restore=1.0, step=13.0)]
    summary = summarise(write_run(tmp_path, events, beats))
    assert (summary.attempts, summary.lost_steps) == (1, 2)
    assert used(summary) == {
        "startup": 1 + 2.0 + 3 + 2.0,
        "restore": 1.0,
        "steps": 4 + 13.0,
        "lost": 2 + 1.0,
        "shutdown": 1.0,
    }


def test_an_attempt_that_was_stopped_before_its_first_step(tmp_path: Path) -> None:
    events: Events = [
        started(0, 6, allocated=0, startup=5.0),
        said("resumed", 0, 8, step=3, seconds=2.0),
        said("signal", 0, 8.5, step=3),
        said("requeued", 0, 9, step=3, reason="preempted"),
    ]
    folder = write_run(tmp_path, events, [])
    ended(folder, 0, 12)
    assert used(summarise(folder)) == {"startup": 6.0, "restore": 2.0, "shutdown": 1.0}
    events[0]["detail"]["job_id"] = "local-77"  # its supervisor has it until its ranks have ended
    assert used(summarise(write_run(tmp_path, events, []))) == {"startup": 6.0, "restore": 2.0, "shutdown": 4.0}


def test_an_attempt_whose_requeue_failed_has_its_nodes_until_it_ends(tmp_path: Path) -> None:
    events: Events = [
        started(0, 2, allocated=0),
        said("signal", 0, 12, step=10),
        said("checkpoint_saved", 0, 13, step=10, seconds=1.0),
        said("requeued", 0, 13, step=10, reason="preempted"),
        said("held", 0, 33, step=10, reason="saved, but the requeue failed"),
    ]
    folder = write_run(tmp_path, events, [line(0, 10, 12, startup=2.0, step=10.0)])
    ended(folder, 0, 35)
    assert used(summarise(folder)) == {"startup": 2.0, "steps": 10.0, "checkpoint": 1.0, "shutdown": 22.0}


def test_what_a_later_attempt_tells_of_an_earlier_one_does_not_lengthen_it(tmp_path: Path) -> None:
    events: Events = [
        started(0, 2, allocated=0),
        started(1, 102, allocated=100),
        said("failed", 0, 101, reason="node n1 is DOWN", cause="node_failure", host="n1"),
    ]
    beats = [line(0, 8, 10, startup=2.0, step=8.0), line(1, 3, 105, startup=2.0, step=3.0)]
    summary = summarise(write_run(tmp_path, events, beats))
    assert summary.allocated_seconds == 15.0
    assert used(summary) == {"queue": 90.0, "startup": 4.0, "steps": 3.0, "lost": 8.0}


def test_the_time_of_lines_that_are_torn_is_shared_out(tmp_path: Path) -> None:
    beats = [line(0, 10, 12, startup=2.0, step=10.0), line(0, 30, 36, step=9.0, data=1.0)]
    summary = summarise(write_run(tmp_path, [started(0, 2, allocated=0)], beats))
    assert used(summary) == pytest.approx({"startup": 2.0, "steps": 34 * 19 / 20, "data": 34 / 20}, abs=0.001)


def test_a_run_that_trains_has_lost_nothing_yet(tmp_path: Path) -> None:
    events: Events = [started(0, 2, allocated=0), said("checkpoint_saved", 0, 15, step=10, seconds=9.0)]
    summary = summarise(write_run(tmp_path, events, [line(0, 10, 12, startup=2.0, step=10.0)]))
    assert used(summary) == {"startup": 2.0, "steps": 13.0}


def test_lines_of_older_versions_have_no_buckets(tmp_path: Path) -> None:
    beats = [line(0, 10, 12, startup=2.0, step=10.0), {**line(0, 20, 22), "spent": None}]
    summary = summarise(write_run(tmp_path, [started(0, 2, allocated=0)], beats))
    assert (summary.buckets, summary.goodput) == ({}, round(20 / 22, 4))


def test_a_command_that_says_nothing_of_steps_has_no_buckets(tmp_path: Path) -> None:
    events: Events = [said("started", 0, 2, detail={"job_id": "7"}), said("completed", 0, 9)]
    assert summarise(write_run(tmp_path, events, [])).buckets == {}


def test_the_result_is_brought_up_to_the_end_of_the_allocation(tmp_path: Path) -> None:
    events: Events = [started(0, 2, allocated=0), said("checkpoint_saved", 0, 15, step=10, seconds=3.0)]
    folder = write_run(tmp_path, events, [line(0, 10, 12, startup=2.0, step=10.0)])
    close_books(folder)
    assert folder.result() is None
    write_result(folder, "COMPLETED", attempts=1, final_step=10)
    with open(folder.events_path, "a") as stream:
        stream.write(json.dumps(said("completed", 0, 16, step=10)) + "\n")
    ended(folder, 0, 20)
    close_books(folder)
    result = folder.result()
    assert result is not None
    assert {bucket: seconds for bucket, seconds in result["buckets"].items() if seconds} == {
        "startup": 2.0,
        "steps": 10.0,
        "checkpoint": 3.0,
        "shutdown": 5.0,
    }
    assert (result["goodput"], result["state"], result["attempts"]) == (0.5, "COMPLETED", 1)
    assert result["measured"] == {
        "step_p95_s": 1.0,
        "save_p95_s": 3.0,
        "blocked_p95_s": 3.0,
        "interruptions": 0,
        "trained_s": 13.0,
    }


def test_who_writes_that_the_run_has_completed_counts_its_last_save(tmp_path: Path) -> None:
    events: Events = [started(0, 2, allocated=0), said("checkpoint_saved", 0, 15, step=10, seconds=3.0)]
    folder = write_run(tmp_path, events, [line(0, 10, 12, startup=2.0, step=10.0)])
    summary = summarise(folder, completing_s=ZERO + 16)
    assert used(summary) == {"startup": 2.0, "steps": 10.0, "checkpoint": 3.0, "shutdown": 1.0}


def test_books_of_a_run_that_lost_steps(tmp_path: Path) -> None:
    """Attempt 0 does 10 steps and dies, saved at 6; attempt 1 does 7 to 12 and completes: 4 lost, 12 s of 30 count."""
    events = [
        {"event": "submitted", "time": stamp(0)},
        {"event": "started", "attempt": 0, "time": stamp(20), "detail": {"job_id": "41", "total_steps": 12}},
        {"event": "checkpoint_saved", "attempt": 0, "step": 6, "time": stamp(27)},
        {"event": "started", "attempt": 1, "time": stamp(50), "detail": {"job_id": "42", "total_steps": 12}},
        {"event": "resumed", "attempt": 1, "step": 6, "time": stamp(52)},
        {"event": "completed", "attempt": 1, "step": 12, "time": stamp(70)},
    ]
    beats = [beat(0, step, 20 + step) for step in range(1, 11)]
    beats += [beat(1, step, 46 + step) for step in range(7, 13)]
    assert summarise(write_run(tmp_path, events, beats)) == Summary(
        attempts=2,
        last_step=12,
        lost_steps=4,
        goodput=0.4,
        allocated_seconds=30.0,
        wall_seconds=70.0,
        total_steps=12,
        job_id="42",
        last_sign_s=pytest.approx(1769853670.0),
    )


def test_steps_since_the_last_logged_one_are_counted_with_it(tmp_path: Path) -> None:
    events = [
        {"event": "started", "attempt": 0, "time": stamp(0), "detail": {"total_steps": 20}},
        {"event": "completed", "attempt": 0, "step": 20, "time": stamp(50)},
    ]
    summary = summarise(write_run(tmp_path, events, [beat(0, 10, 20, 2.0), beat(0, 20, 40, 2.0)]))
    assert summary.goodput == 0.8


def test_attempts_that_never_trained_lose_nothing_and_cost_their_time(tmp_path: Path) -> None:
    events = [
        {"event": "started", "attempt": 0, "time": stamp(0)},
        {"event": "checkpoint_saved", "attempt": 0, "step": 5, "time": stamp(5)},
        {"event": "requeued", "attempt": 0, "step": 5, "reason": "preempted", "time": stamp(5)},
        {"event": "started", "attempt": 1, "time": stamp(10)},
        {"event": "signal", "attempt": 1, "step": 0, "time": stamp(15)},
        {"event": "requeued", "attempt": 1, "step": 0, "reason": "preempted", "time": stamp(15)},
        {"event": "started", "attempt": 2, "time": stamp(20)},
        {"event": "resumed", "attempt": 2, "step": 5, "time": stamp(20)},
    ]
    beats = [beat(0, step, step) for step in range(1, 6)] + [beat(2, step, 15 + step) for step in range(6, 11)]
    summary = summarise(write_run(tmp_path, events, beats))
    assert (summary.lost_steps, summary.goodput, summary.last_step, summary.attempts) == (0, round(10 / 15, 4), 10, 3)


def test_a_run_that_starts_over_loses_all_it_had(tmp_path: Path) -> None:
    events = [{"event": "started", "attempt": number, "time": stamp(10 * number)} for number in (0, 1)]
    beats = [beat(0, step, step) for step in range(1, 6)] + [beat(1, step, 10 + step) for step in range(1, 3)]
    summary = summarise(write_run(tmp_path, events, beats))
    assert (summary.lost_steps, summary.last_step) == (5, 2)


def test_an_empty_folder_has_empty_books(tmp_path: Path) -> None:
    summary = summarise(RunFolder(tmp_path))
    assert (summary.attempts, summary.lost_steps, summary.goodput, summary.wall_seconds) == (0, 0, None, 0.0)


def test_torn_lines_cost_only_themselves(tmp_path: Path) -> None:
    folder = write_run(tmp_path, attempt(0, resumed=None, saved=2, reason=None), [beat(0, 1, 1), beat(0, 2, 2)])
    with open(folder.heartbeat_path, "a") as stream:
        stream.write('{"time":"2026-01-31T10:00:03Z","attempt":0,"st')
    assert summarise(folder).last_step == 2


def test_the_start_up_before_the_first_word_is_allocated_time(tmp_path: Path) -> None:
    started = {"event": "started", "attempt": 0, "time": stamp(30), "detail": {"startup_seconds": 10.0}}
    summary = summarise(write_run(tmp_path, [started], [beat(0, step, 30 + step) for step in range(1, 21)]))
    assert summary.allocated_seconds == 30.0
    assert summary.goodput == round(20 / 30, 4)
