"""The books of a run, carried on: at every moment what reading the whole run anew would give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_events import stamp

from cfe_hpc.recovery.ledger import summarise
from cfe_hpc.reports import ongoing
from cfe_hpc.reports.ongoing import Ongoing, follow_up
from cfe_hpc.runfolder import RunFolder

RUN = "toy-20260131-235959-abcd"


class Writer:
    """A run that goes on, second by second."""

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root / RUN)
        self.folder.control.mkdir(parents=True)
        self.at_s, self.attempt, self.step = 0.0, -1, 0
        self.event("submitted")

    def event(self, name: str, **fields: Any) -> None:
        self.at_s += 0.5
        record = {"time": stamp(self.at_s), "event": name, "run_id": RUN, **fields}
        if self.attempt >= 0:
            record["attempt"] = self.attempt
        with open(self.folder.events_path, "a") as stream:
            stream.write(json.dumps(record) + "\n")

    def start(self, resumed: int | None) -> None:
        self.attempt += 1
        detail = {"job_id": "7", "total_steps": 1000, "allocated_s": 1769853600 + self.at_s, "startup_seconds": 0.2}
        self.event("started", host="n1", detail=detail)
        self.step = resumed or 0
        if resumed is not None:
            self.event("resumed", step=resumed, seconds=0.1)

    def beat(self, steps: int, *, torn: bool = False, **spent: float) -> None:
        self.step += steps
        self.at_s += steps
        parts = {"step": 0.7 * steps, "data": 0.1 * steps, **spent}
        record = {"time": stamp(self.at_s), "attempt": self.attempt, "step": self.step, "step_seconds": 0.9}
        line = json.dumps({**record, "spent": parts}) + "\n"
        with open(self.folder.heartbeat_path, "a") as stream:
            stream.write(line[:20] if torn else line)
            stream.write("\n" if torn else "")


def assert_same(found: Ongoing, folder: RunFolder) -> None:
    told, whole = asdict(found.summary), asdict(summarise(folder))
    for books in (told, whole):
        books["buckets"] = {name: pytest.approx(value, abs=0.003) for name, value in books["buckets"].items()}
        for key in ("goodput", "allocated_seconds", "wall_seconds", "last_sign_s"):
            books[key] = None if books[key] is None else pytest.approx(books[key], abs=0.003)
    assert told == whole


def _save(run: Writer, number: int) -> None:
    run.event("checkpoint_saved", step=run.step + number // 4, seconds=0.3)


def _roll_back(run: Writer, number: int) -> None:
    run.step = max(0, run.step - number)
    run.event("rolled_back", step=run.step)


def _preempt(run: Writer, number: int) -> None:
    run.event("signal", step=run.step, reason="TERM")
    run.event("preempted", step=run.step)
    run.event("requeued", step=run.step, reason="preempted")
    run.folder.promise(f"requeued-{run.attempt}")
    run.at_s += number
    run.start(max(0, run.step - number))


DEEDS: dict[str, Callable[[Writer, int], object]] = {
    "beat": lambda run, number: run.beat(number),
    "another": lambda run, number: run.beat(number),
    "beats": lambda run, number: [run.beat(1) for _ in range(number)],
    "torn": lambda run, number: run.beat(number, torn=True),
    "evaluated": lambda run, number: run.beat(number, evaluation=0.4 * number, checkpoint=0.1),
    "late": lambda run, number: run.event("degraded", reason="checkpoint_late"),
    "ended": lambda run, number: run.folder.promise(f"ended-{run.attempt}", status=number),
    "saved": _save,
    "rolled back": _roll_back,
    "preempted": _preempt,
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(DEEDS)), st.integers(1, 4), st.booleans()), max_size=25))
def test_carried_on_is_the_same_as_read_anew(
    tmp_path_factory: pytest.TempPathFactory, deeds: list[tuple[str, int, bool]]
) -> None:
    run = Writer(tmp_path_factory.mktemp("ongoing"))
    run.start(None)
    found = follow_up(run.folder, None)
    for deed, number, looked in deeds:
        DEEDS[deed](run, number)
        if looked:
            stored = json.loads(json.dumps(found.stored()))
            found = follow_up(run.folder, Ongoing.restored(stored))
            assert_same(found, run.folder)
    assert_same(follow_up(run.folder, found), run.folder)


def test_steps_alone_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Writer(tmp_path)
    run.start(None)
    run.beat(3)
    found = follow_up(run.folder, None)

    def read(*_: Any) -> None:
        raise AssertionError("the whole run was read again")

    monkeypatch.setattr(ongoing, "parts_of", read)
    assert follow_up(run.folder, found) is found
    run.beat(2)
    run.event("checkpoint_saved", step=5)
    assert follow_up(run.folder, found).summary.last_step == 5
    run.event("signal", step=5, reason="TERM")
    with pytest.raises(AssertionError, match="read again"):
        follow_up(run.folder, found)


def test_what_was_kept_by_another_version_is_read_anew(tmp_path: Path) -> None:
    run = Writer(tmp_path)
    run.start(None)
    run.beat(3)
    stored = follow_up(run.folder, None).stored()
    assert Ongoing.restored({**stored, "more": 1}) is None
    assert Ongoing.restored({"summary": {}}) is None
    assert Ongoing.restored(None) is None
