"""Checkpoints at a remote, through fsspec: copied with the manifest last, kept by a rule of their own, fetched back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_groups import all_good, run_ranks
from test_checkpoint_store import find, put
from test_checkpoint_tiers import flip

from cfe_hpc.checkpoints.tiers import remote
from cfe_hpc.checkpoints.tiers.reclaim import fetch
from cfe_hpc.checkpoints.tiers.remote import Remote
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint

pytest.importorskip("fsspec")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The shared folder, with steps 1 to 3 of two ranks."""
    path = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        all_good(run_ranks(2, lambda group, step=step: put(path, group, step)))
    return path


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


def step(root: Path, number: int) -> Path:
    return root / f"step-{number:09d}"


def fetched(root: Path, url: str, size: int = 2) -> tuple[int | None, list[str]]:
    reports: list[str] = []

    def work(group) -> int | None:
        return fetch(root, url, run_id="run-1", attempt=1, group=group, report=lambda _, why: reports.append(why))

    (found,) = set(all_good(run_ranks(size, work)))
    return found, reports


@pytest.mark.parametrize("size", [1, 2, 3] if os.environ.get("CFE_TEST_FULL") else [3])
def test_what_was_pushed_is_fetched_by_any_number_of_ranks(root: Path, url: str, size: int) -> None:
    pushed = Remote(url, "run-1")
    assert pushed.push(step(root, 2)) > 30_000
    assert pushed.push(step(root, 2)) == 0  # it is there
    assert pushed.steps() == [2] and Remote(url, "run-2").steps() == []
    shutil.rmtree(root)
    assert fetched(root, url, size) == (2, [])
    assert {found for found, _ in all_good(run_ranks(size, lambda group: find(root, group)))} == {2}


def test_another_process_finds_it(root: Path, url: str) -> None:
    Remote(url, "run-1").push(step(root, 3))
    program = f"from cfe_hpc.checkpoints.tiers.remote import Remote; print(Remote({url!r}, 'run-1').steps())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[3]\n"


def test_the_oldest_go_and_the_manifest_goes_first(root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Remote(url, "run-1")
    for number in (1, 2, 3):
        there.push(step(root, number))
    deleted: list[str] = []
    monkeypatch.setattr(there._files, "rm", lambda path, recursive: deleted.append(path.rpartition("/run-1/")[2]))
    assert there.retain(2) == [1]
    assert deleted == ["step-000000001/manifest.json", "step-000000001"]
    monkeypatch.undo()
    assert there.retain(1) == [2, 1]
    assert there.steps() == [3]


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00001.json"])
def test_what_is_damaged_on_the_way_out_gets_no_manifest(root: Path, url: str, name: str) -> None:
    flip(step(root, 3) / name, 5000 if name.endswith("bin") else 40)
    with pytest.raises(CorruptCheckpoint, match="shard-00001"):
        Remote(url, "run-1").push(step(root, 3))
    assert Remote(url, "run-1").steps() == []


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00001.json", "manifest.json"])
def test_what_is_damaged_there_is_told_and_the_one_before_is_fetched(
    root: Path, url: str, tmp_path: Path, name: str
) -> None:
    for number in (2, 3):
        Remote(url, "run-1").push(step(root, number))
    shutil.rmtree(root)
    flip(tmp_path / "remote" / "run-1" / "step-000000003" / name, 50)
    found, reports = fetched(root, url)
    assert found == 2 and len(reports) == 1 and name in reports[0]
    assert [path.name for path in root.iterdir()] == ["step-000000002"]


def test_moments_of_failure_are_ridden_out_and_longer_ones_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS_S", (0.0, 0.0, 0.0))
    there = Remote("memory://bucket/prefix", "run-1")
    open_, failures = there._files.open, [3]

    def fragile(path: str, mode: str):
        if path.endswith("shard-00001.bin") and failures[0]:
            failures[0] -= 1
            raise ConnectionError("connection reset")
        return open_(path, mode)

    monkeypatch.setattr(there._files, "open", fragile)
    try:
        assert there.push(step(root, 1)) > 0
        failures[0] = 4
        with pytest.raises(CheckpointError, match=r"shard-00001.bin: ConnectionError: connection reset"):
            there.push(step(root, 2))
        assert there.steps() == [1]
    finally:
        there._files.store.clear()


def test_an_unknown_kind_of_url_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.remote: nowhere://x: ValueError"):
        Remote("nowhere://x", "run-1")
