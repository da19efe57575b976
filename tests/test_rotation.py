"""Rotation: what stays, what goes, and that nothing goes that is still needed."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfe_hpc.checkpoints import folders, marks
from cfe_hpc.checkpoints.keeping import pins, remover, rotation
from cfe_hpc.checkpoints.keeping.remover import Remover
from cfe_hpc.checkpoints.keeping.rotation import Kept, Rotation, inventory, reasons, rotate
from cfe_hpc.checkpoints.manifest import FileFacts, Identity, Manifest
from cfe_hpc.config.job import Checkpoint
from cfe_hpc.errors import CheckpointError


def manifest(step: int, attempt: int = 0, metrics: Mapping[str, float] | None = None) -> Manifest:
    return Manifest(
        identity=Identity(run_id="run-1", step=step, attempt=attempt, world_size=1, token="00"),
        time="2026-01-01T00:00:00.000Z",
        layout={},
        metrics=dict(metrics or {}),
        files={name: FileFacts(size_bytes=3, crc32c=0) for name in ("shard-00000.bin", "shard-00000.json")},
    )


def make(root: Path, step: int, attempt: int = 0, **metrics: float) -> Path:
    path = root / folders.step_name(step)
    path.mkdir(parents=True)
    (path / "manifest.json").write_bytes(manifest(step, attempt, metrics).seal())
    for name in ("shard-00000.bin", "shard-00000.json"):
        (path / name).write_bytes(b"abc")
    return path


def steps(root: Path) -> list[int]:
    return sorted(step for step, _ in folders.committed(root))


LOSSES = {10: 3.0, 20: 1.0, 30: math.nan, 40: 1.0, 50: 2.0, 60: 9.0}


@pytest.mark.parametrize(
    ("policy", "protect", "left"),
    [
        ({"keep_last": 1}, set(), [60]),
        ({"keep_last": 2}, set(), [50, 60]),
        ({"keep_last": 99}, set(), [10, 20, 30, 40, 50, 60]),
        ({"keep_last": 1}, {10, 70}, [10, 60]),
        ({"keep_last": 1, "keep_every_steps": 20}, set(), [20, 40, 60]),
        ({"keep_last": 1, "keep_best": "loss:min"}, set(), [40, 60]),  # of equals the newest
        ({"keep_last": 1, "keep_best": "loss:max"}, set(), [60]),
        ({"keep_last": 1, "keep_best": "other:max"}, set(), [60]),
        ({"keep_last": 1, "keep_every_steps": 30, "keep_best": "loss:min"}, {20}, [20, 30, 40, 60]),
    ],
)
def test_the_policy_is_a_union(tmp_path: Path, policy: dict, protect: set[int], left: list[int]) -> None:
    for step, loss in LOSSES.items():
        make(tmp_path, step, loss=loss)
    deleted = rotate(tmp_path, Checkpoint(**policy), protect=protect)
    assert steps(tmp_path) == left and deleted == sorted(set(LOSSES) - set(left))
    assert len(os.listdir(tmp_path)) == len(left)


def test_infinity_may_be_best_and_not_a_number_never(tmp_path: Path) -> None:
    for step, loss in {1: math.inf, 2: math.nan, 3: 5.0}.items():
        make(tmp_path, step, loss=loss)
    rotate(tmp_path, Checkpoint(keep_last=1, keep_best="loss:max"), protect=())
    assert steps(tmp_path) == [1, 3]


def test_what_a_later_attempt_saved_is_the_last_even_at_a_lower_step(tmp_path: Path) -> None:
    for step, attempt in {100: 0, 200: 0, 300: 0, 150: 1}.items():
        make(tmp_path, step, attempt)
    rotate(tmp_path, Checkpoint(keep_last=1), protect={100})
    assert steps(tmp_path) == [100, 150]


def test_what_is_not_whole_neither_counts_nor_goes(tmp_path: Path) -> None:
    for step in range(1, 8):
        make(tmp_path, step)
    (tmp_path / "step-000000007" / "manifest.json").write_bytes(b"")
    (tmp_path / "step-000000006" / "shard-00000.bin").unlink()
    (tmp_path / "step-000000005" / "shard-00000.json").write_bytes(b"a")
    (tmp_path / "step-000000008.tmp-0-00aa").mkdir()
    (tmp_path / "notes").write_text("mine")
    assert rotate(tmp_path, Checkpoint(keep_last=2), protect=()) == [1, 2]
    assert steps(tmp_path) == [3, 4, 5, 6, 7]
    assert (tmp_path / "notes").exists() and (tmp_path / "step-000000008.tmp-0-00aa").exists()


def test_a_deletion_that_fails_is_logged_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1, 5):
        make(tmp_path, step)
    real = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == "step-000000002":
            raise PermissionError(13, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(folders.os, "rename", refuse)
    assert rotate(tmp_path, Checkpoint(keep_last=1), protect=()) == [1, 3]
    assert steps(tmp_path) == [2, 4]
    assert "step-000000002 cannot be deleted: Permission denied" in caplog.text


def test_a_deletion_cut_short_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 4):
        make(tmp_path, step)
    monkeypatch.setattr(Remover, "wake", lambda self: None)  # the process dies before it has unlinked anything
    assert rotate(tmp_path, Checkpoint(keep_last=2), protect=()) == [1]
    monkeypatch.undo()
    assert steps(tmp_path) == [2, 3] and len(os.listdir(tmp_path)) == 3
    assert rotate(tmp_path, Checkpoint(keep_last=2), protect=()) == []
    assert len(os.listdir(tmp_path)) == 2


def test_nobody_waits_for_files_to_be_unlinked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 4):
        make(tmp_path, step)
    slow = threading.Event()
    real = remover._unlink

    def unlink(path: Path) -> None:
        assert slow.wait(30)
        real(path)

    monkeypatch.setattr(remover, "_unlink", unlink)
    rotation = Rotation(tmp_path, Checkpoint(keep_last=1))
    assert rotation.rotate() == [1, 2] and steps(tmp_path) == [3]
    make(tmp_path, 4)
    assert rotation.rotate() == [3] and steps(tmp_path) == [4]
    assert not rotation.finish(timeout_s=0.01)
    slow.set()
    assert rotation.finish() and os.listdir(tmp_path) == ["step-000000004"]


def test_unlinking_is_throttled_until_somebody_waits_for_it(tmp_path: Path) -> None:
    trash = tmp_path / ".trash-step-000000001-00aa"
    trash.mkdir()
    for number in range(50):
        (trash / str(number)).touch()
    (trash / "foreign").mkdir()
    removing = Remover(tmp_path, files_per_s=0.01)
    removing.wake()
    while len(os.listdir(trash)) == 51:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(os.listdir(trash)) == 50
    assert removing.finish() and os.listdir(tmp_path) == []


def test_five_hundred_checkpoints_are_rotated_at_once(tmp_path: Path) -> None:
    numbers = random.Random(0).sample(range(1, 100_000), 500)
    for step in numbers:
        make(tmp_path, step, loss=step % 97)
    deleted = rotate(tmp_path, Checkpoint(keep_last=3, keep_every_steps=1000, keep_best="loss:min"), protect=())
    left = steps(tmp_path)
    best = min(numbers, key=lambda step: (step % 97, -step))
    assert left == sorted({*sorted(numbers)[-3:], best, *(step for step in numbers if step % 1000 == 0)})
    assert sorted([*deleted, *left]) == sorted(numbers)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just(math.nan), st.floats(-3, 3))), min_size=1, max_size=12),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 4)),
    st.sampled_from([None, "loss:min", "loss:max"]),
    st.sets(st.integers(0, 12)),
)
def test_what_may_go_is_what_no_reason_keeps(saved, keep_last, every, best, protect) -> None:
    everything = [
        Kept(path=Path(str(step)), step=step, attempt=attempt, metrics={"loss": loss})
        for step, (attempt, loss) in enumerate(saved)
    ]
    everything.sort(key=lambda each: (each.attempt, each.step), reverse=True)
    policy = Checkpoint(keep_last=keep_last, keep_every_steps=every, keep_best=best)
    why = reasons(everything, policy, dict.fromkeys(protect, "protected"))
    gone = {step for step, words in why.items() if not words}
    assert len(everything) - len(gone) >= min(keep_last, len(everything))
    assert everything[0].step not in gone and not gone & protect
    losses = {each.step: each.metrics["loss"] for each in everything if each.metrics["loss"] == each.metrics["loss"]}
    if best and losses:
        top = (min if best == "loss:min" else max)(losses.values())
        assert any(losses[step] == top for step in losses.keys() - gone)
    if every:
        assert all(step % every for step in gone)


def test_an_empty_or_missing_folder_has_nothing_to_rotate(tmp_path: Path) -> None:
    assert rotate(tmp_path / "none", Checkpoint(), protect=()) == [] and inventory(tmp_path) == []


def test_a_save_reads_no_manifest_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 51):
        make(tmp_path, step, loss=step % 7)
    once = Rotation(tmp_path, Checkpoint(keep_last=2, keep_every_steps=1, keep_best="loss:min"))
    once.prepare()
    read: list[str] = []
    real = rotation.read_manifest

    def note(folder: Path, run_id: str | None = None) -> Manifest:
        read.append(folder.name)
        return real(folder, run_id)

    monkeypatch.setattr(rotation, "read_manifest", note)
    for step in (51, 52):
        make(tmp_path, step, loss=9.0)
        assert once.rotate() == []
    assert set(read) == {"step-000000051", "step-000000052"}
    again = make(tmp_path / "elsewhere", 50, attempt=1, loss=9.0)
    folders.put_in_place(again, tmp_path / again.name)
    once.rotate()
    assert read[-1] == "step-000000050", "saved again"


def test_what_loses_a_file_while_it_is_remembered_counts_no_more(tmp_path: Path) -> None:
    for step in range(1, 5):
        make(tmp_path, step)
    once = Rotation(tmp_path, Checkpoint(keep_last=4))
    assert once.rotate() == []
    (tmp_path / "step-000000004" / "shard-00000.bin").unlink()
    for step in (5, 6, 7):
        make(tmp_path, step)
    assert once.rotate() == [1, 2] and once.finish()
    assert steps(tmp_path) == [3, 4, 5, 6, 7]


def test_marked_ones_stay_and_a_mark_outlives_its_checkpoint(tmp_path: Path) -> None:
    for step in range(1, 5):
        marks.put(make(tmp_path, step), "verified")
    marks.put(tmp_path / "step-000000001", "pinned", note="the good one")
    marks.put(tmp_path / "step-000000002", "epoch", epoch=0)
    assert rotate(tmp_path, Checkpoint(keep_last=1), protect=()) == [3]
    folders.discard(tmp_path / "step-000000001")
    make(tmp_path, 1, attempt=1)
    assert rotate(tmp_path, Checkpoint(keep_last=1), protect=()) == [4], "a later attempt's step 1 is the last"
    assert steps(tmp_path) == [1, 2]
    marks.remove(tmp_path / "step-000000001", "pinned")
    make(tmp_path, 5, attempt=1)
    assert rotate(tmp_path, Checkpoint(keep_last=1), protect=()) == [1]
    assert sorted(path.name for path in tmp_path.glob("*.verified")) == [f"step-{n:09d}.verified" for n in (2,)]


def test_who_pins_while_it_is_being_rotated_away_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark comes after rotation has read the folder, and before or after the rename."""
    real = os.rename
    for moment in ("before", "after"):
        path = make(tmp_path / moment, 1)
        make(tmp_path / moment, 2)

        def rename(source: Path, target: Path, path: Path = path, moment: str = moment) -> None:
            if moment == "after":
                real(source, target)
            if Path(source) == path:
                marks.put(path, "pinned")
            if moment == "before":
                real(source, target)

        monkeypatch.setattr(folders.os, "rename", rename)
        assert rotate(tmp_path / moment, Checkpoint(keep_last=1), protect=()) == []
        monkeypatch.undo()
        assert steps(tmp_path / moment) == [1, 2]


def test_what_pin_says_is_pinned_stays_whatever_rotates_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rotations, and a person who pins the one that they are about to take out: no pinned one is ever lost."""
    monkeypatch.setattr(pins, "_PATIENCE_S", 0.05)
    rng, done = random.Random(0), threading.Event()
    root, pinned, late = tmp_path / "checkpoints", [], []

    def rotate_again_and_again() -> None:
        mine = Rotation(root, Checkpoint(keep_last=1))
        while not done.is_set():
            mine.rotate()
            time.sleep(0.0005)

    threads = [threading.Thread(target=rotate_again_and_again) for _ in range(2)]
    root.mkdir()
    for thread in threads:
        thread.start()
    try:
        for step in range(1, 80, 2):
            path, newer = make(root, step), make(tmp_path / "drafts", step + 1)
            due = threading.Timer(rng.uniform(0.0, 0.01), os.rename, (newer, root / newer.name))
            due.start()  # from then on no reason keeps `path`
            try:
                pins.pin(path, "run-1")
                pinned.append(path)
            except CheckpointError:
                late.append(path)
            due.join()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert pinned and late, "all in one order: the race was not there"
    for path in pinned:
        assert rotation.glance(path).identity.step in steps(root)
    assert not [path for path in late if marks.holds(path)]


def test_who_dies_while_a_pinned_one_is_out_loses_nothing(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    again = make(tmp_path, 2)
    os.rename(path, tmp_path / ".leaving-step-000000001-00aa")
    marks.put(path, "pinned")
    os.rename(again, tmp_path / ".leaving-step-000000002-00aa")
    make(tmp_path, 2, attempt=1)
    marks.put(again, "pinned")
    rotate(tmp_path, Checkpoint(keep_last=1), protect=())
    assert steps(tmp_path) == [1, 2] and inventory(tmp_path)[0].attempt == 1
    assert not list(tmp_path.glob(".*"))
