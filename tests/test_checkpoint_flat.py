"""What a save asks of the system does not grow: not with the checkpoints that are there, not with the steps done."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_async import saving, wait_for
from test_checkpoint_store import content, put

from cfe_hpc.checkpoints.folders import committed, trash
from cfe_hpc.checkpoints.keeping.rotation import Retention, Rotation
from cfe_hpc.checkpoints.protocols import SoloGroup

EVERY = 7
POLICY = Retention(keep_last=2, keep_every_steps=EVERY)
MANY = 200


def filled(folder: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with so many checkpoints that the policy keeps."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        for number in range(1, kept + 1):
            put(folder, SoloGroup(), EVERY * number)
    return folder


def passing(first: int, count: int) -> list[int]:
    """Steps from `first` on whose checkpoints are deleted again."""
    return [step for step in range(first, first + 2 * count) if step % EVERY][:count]


def calls(act: Callable[[], Any]) -> Counter[str]:
    """How often `act` called each function of the system, in this thread and in those that it starts."""
    found: Counter[str] = Counter()

    def hear(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__module__", None) in ("posix", "io", "_io"):
            found[called.__name__] += 1

    threading.setprofile(hear)
    sys.setprofile(hear)
    try:
        act()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    del found["fspath"]
    return found


def test_a_save_makes_the_same_calls_however_many_checkpoints_and_steps_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(kept: int, first: int) -> Counter[str]:
        folder = filled(tmp_path / f"{kept} {first}", kept, monkeypatch)
        rotation = Rotation(folder, POLICY)
        rotation.prepare()

        def save(step: int) -> None:
            put(folder, SoloGroup(), step)
            rotation.rotate()

        *early, last = passing(first, 4)
        for step in early:  # from the third on each save takes one out
            save(step)
            rotation.finish()
        found = calls(lambda: save(last))
        # Not by finish(): that has the folder listed again, or not, depending on how far the thread is.
        wait_for(lambda: all(thread.name != "checkpoint-remover" for thread in threading.enumerate()), "deleted")
        assert len(committed(folder)) == kept + 2
        return found

    few = measured(1, 10)
    assert few["rename"] >= 2 and few["fsync"] >= 3 and few["open"] + few["stat"] >= 4, few
    assert measured(MANY, MANY * EVERY + 3) == few
    assert measured(1, 10_000) == few


def test_a_writer_reads_the_same_however_many_checkpoints_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(kept: int) -> int:
        folder = filled(tmp_path / f"{kept}", kept, monkeypatch)
        with saving(folder, SoloGroup(), keep_last=2, keep_every_steps=EVERY) as saves:

            def save(step: int) -> None:
                saves.begin(content(step, SoloGroup()), step=step)
                assert saves.finish() is not None
                wait_for(lambda: len(committed(folder)) <= kept + 2 and not trash(folder), "rotated")

            steps = passing(kept * EVERY, 8)
            for step in steps[:3]:
                save(step)
            before = reads(saves.writer_pid)
            for step in steps[3:]:
                save(step)
            return reads(saves.writer_pid) - before

    few = measured(1)
    assert few > 0
    assert measured(MANY) < few + 20  # of 5 saves: no manifest is read again for each of them


def reads(pid: int | None) -> int:
    """Read calls that a process has made."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["syscr"])
