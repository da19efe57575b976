"""Attempts that find no checkpoint of use where they look first, or begin from another program's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import events, make_folder, make_spec
from test_checkpoint_tiers import flip
from test_stopping import RANK, Count

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.checkpoints.tiers import nodelocal
from cfe_hpc.checkpoints.tiers.remote import Remote
from cfe_hpc.config.run import RunSpec
from cfe_hpc.devices.resolve import resolve
from cfe_hpc.errors import CorruptCheckpoint
from cfe_hpc.ranks.bootstrap import Place
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.rendezvous import Meeting
from cfe_hpc.ranks.run import Run
from cfe_hpc.ranks.signals import StopFlag
from cfe_hpc.recovery.ledger import summarise
from cfe_hpc.runfolder import RunFolder

JOB = {"every_steps": 2, "keep_last": 9}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the only node keeps what a job with `local` saves."""
    path = nodelocal.expand_home(f"{tmp_path}/node", make_spec(tmp_path).run_id, {})
    nodelocal.make_home(path)
    return path


def spec_with(tmp_path: Path, **checkpoint: Any) -> RunSpec:
    site = {"storage": {"node_local": f"{tmp_path}/node"}}
    return make_spec(tmp_path, job={"checkpoint": {**JOB, **checkpoint}}, site=site)


def new_run(tmp_path: Path, **checkpoint: Any) -> RunFolder:
    return make_folder(tmp_path, spec_with(tmp_path, **checkpoint))


def train(folder: RunFolder, total: int, *, attempt: int = 0, **options: Any) -> Count:
    """One attempt, of one rank, that adds up its steps."""
    meeting = Meeting(address="127.0.0.1", master_port=0, control_port=0)
    facts = read_facts({**RANK, "CFE_ATTEMPT": str(attempt)})
    place = Place(facts=facts, meeting=meeting, device=resolve("cpu").device, group=SoloGroup())
    run, count = Run(folder, RunSpec.read(folder.run_toml), place, StopFlag()), Count()
    run.track(count=count)
    for step in run.steps(total, **options):
        count.total += step
    return count


def damage(folder: RunFolder) -> dict[str, bytes]:
    """Damage all checkpoints on the shared filesystem; their data files as they are then."""
    paths = sorted(folder.checkpoints.glob("step-*/shard-00000.json"))
    for path in paths:
        flip(path, 40)
    return {path.parent.name: path.read_bytes() for path in paths}


def left(folder: RunFolder, bad: dict[str, bytes]) -> list[str]:
    """Which of the damaged ones are as they were."""
    return [
        name
        for name, content in bad.items()
        if (folder.checkpoints / name / "shard-00000.json").read_bytes() == content
    ]


def test_when_none_on_the_shared_filesystem_verifies_the_remotes_newest_is_used(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/remote"
    folder = new_run(tmp_path, remote=url, remote_every_steps=100)
    train(folder, 6)
    remote = Remote(url, make_spec(tmp_path).run_id)
    for step in (2, 4):
        remote.push(folder.checkpoints / f"step-{step:09d}")
    bad = damage(folder)
    assert train(folder, 7, attempt=1).total == sum(range(7))
    assert [event["step"] for event in events(folder, "resumed")] == [4]
    failed = [event["detail"].split(":")[0] for event in events(folder, "checkpoint_failed")]
    assert failed == ["step-000000006", "step-000000004", "step-000000002"]
    saved = [event["step"] for event in events(folder, "checkpoint_saved") if event["attempt"] == 1]
    assert saved == [4, 6, 7]
    assert left(folder, bad) == ["step-000000002"]  # those of the other steps have been saved since


def test_of_nodes_and_remote_the_newer_is_used_and_a_bad_one_passed_over(tmp_path: Path, home: Path) -> None:
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/remote"
    folder = new_run(tmp_path)
    train(folder, 6)
    tiers = {"remote": url, "remote_every_steps": 100, "local": True, "async": True}
    spec_with(tmp_path, **tiers).write(folder.run_toml)
    remote = Remote(url, make_spec(tmp_path).run_id)
    remote.push(folder.checkpoints / "step-000000002")
    for step in (4, 6):
        shared = folder.checkpoints / f"step-{step:09d}"
        shutil.copytree(shared, home / nodelocal.copy_name(read_manifest(shared).identity))
    flip(next(home.glob("step-000000006.*")) / "shard-00000.json", 40)
    damage(folder)
    assert train(folder, 7, attempt=1).total == sum(range(7))
    assert [event["step"] for event in events(folder, "resumed")] == [4]
    told = [event["detail"] for event in events(folder, "checkpoint_failed")]
    assert len(told) == 4 and "step-000000006: on the nodes: " in told[3]


def test_a_run_is_held_when_none_verifies_anywhere(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    (tmp_path / "remote").write_text("no folder")
    folder = new_run(tmp_path, remote=f"file://{tmp_path}/remote/x", remote_every_steps=100)
    train(folder, 4)
    bad = damage(folder)
    with pytest.raises(CorruptCheckpoint, match="none of 2 checkpoints"):
        train(folder, 7, attempt=1)
    assert (folder.result() or {})["state"] == "HELD"
    assert left(folder, bad) == list(bad)
    assert "checkpoint_remote" in {event["reason"] for event in events(folder, "degraded")}


def test_what_was_imported_has_its_steps_behind_it_until_the_run_has_its_own(tmp_path: Path) -> None:
    folder = new_run(tmp_path)
    assert train(folder, 103, imported_step=100).total == 100 + 101 + 102
    assert [event["step"] for event in events(folder, "checkpoint_saved")] == [102, 103]
    assert train(folder, 105, attempt=1, imported_step=100).total == sum(range(100, 105))
    assert [event["step"] for event in events(folder, "resumed")] == [100, 103]
    books = summarise(folder)
    assert (books.last_step, books.lost_steps) == (105, 0)
