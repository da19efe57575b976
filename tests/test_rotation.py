"""Rotation: what stays, what goes, and that nothing goes that is still needed."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.manifest import FileFacts, Identity, Manifest
from cfe_hpc.checkpoints.rotation import Kept, inventory, rotate, superfluous
from cfe_hpc.config.job import Checkpoint


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

    def die(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, Checkpoint(keep_last=2), protect=())
    monkeypatch.undo()
    assert steps(tmp_path) == [2, 3] and len(os.listdir(tmp_path)) == 3
    assert rotate(tmp_path, Checkpoint(keep_last=2), protect=()) == []
    assert len(os.listdir(tmp_path)) == 2


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
        Kept(path=Path(str(step)), manifest=manifest(step, attempt, {"loss": loss}))
        for step, (attempt, loss) in enumerate(saved)
    ]
    everything.sort(key=lambda each: (each.manifest.identity.attempt, each.step), reverse=True)
    policy = Checkpoint(keep_last=keep_last, keep_every_steps=every, keep_best=best)
    gone = {each.step for each in superfluous(everything, policy, protect)}
    assert len(everything) - len(gone) >= min(keep_last, len(everything))
    assert everything[0].step not in gone and not gone & protect
    losses = {
        each.step: each.manifest.metrics["loss"]
        for each in everything
        if each.manifest.metrics["loss"] == each.manifest.metrics["loss"]
    }
    if best and losses:
        top = (min if best == "loss:min" else max)(losses.values())
        assert any(losses[step] == top for step in losses.keys() - gone)
    if every:
        assert all(step % every for step in gone)


def test_an_empty_or_missing_folder_has_nothing_to_rotate(tmp_path: Path) -> None:
    assert rotate(tmp_path / "none", Checkpoint(), protect=()) == [] and inventory(tmp_path) == []
