"""Saves that go to the nodes first: complete there before they are durable, with a copy on a partner node."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_groups import all_good, run_ranks
from checkpoint_nodes import node
from test_checkpoint_async import gone, wait_for
from test_checkpoint_store import content, find
from test_checkpoint_tiers import bring

from cfe_hpc.checkpoints.beside import background
from cfe_hpc.checkpoints.beside.background import Background
from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.tiers import nodelocal
from cfe_hpc.checkpoints.tiers.places import tiers_of
from cfe_hpc.errors import CheckpointError


@contextlib.contextmanager
def saving(base: Path, group: Any, *, per_node: int = 1, **options: Any) -> Iterator[tuple[Background, list[str]]]:
    """The saves of one rank, and what they told."""
    told: list[str] = []
    tier = node(base, group.rank // per_node, local_rank=group.rank % per_node, **options)
    saves = Background(
        root=base / "checkpoints",
        run_id="run-1",
        attempt=0,
        group=group,
        policy=Retention(keep_last=3),
        tier=tier,
        degraded=lambda word, detail: told.append(f"{word}: {detail}"),
    )
    (base / "checkpoints").mkdir(exist_ok=True)
    try:
        saves.start()
        yield saves, told
    finally:
        saves.close()


def arrive(saves: Background, group: Any) -> int:
    """Wait until what is on its way is on the shared filesystem; its step."""
    assert saves.drain is not None
    saves.drain.wait()
    info = saves.drain.advance(group, busy=False)
    assert info is not None
    return info.step


@pytest.mark.parametrize("per_node", [1, 2] if os.environ.get("CFE_TEST_FULL") else [2])
def test_a_save_is_complete_on_the_nodes_then_durable(tmp_path: Path, per_node: int) -> None:
    def work(group: Any) -> None:
        with saving(tmp_path, group, per_node=per_node) as (saves, told):
            home = node(tmp_path, group.rank // per_node).home
            for step in (1, 2, 3):
                saves.begin(content(step, group), step=step)
                assert saves.finish() is None and saves.on_nodes == step
                (newest, *_) = nodelocal.held(home)
                assert (newest.step, newest.shards, newest.durable) == (step, tuple(range(group.size)), False)
                assert newest.manifest is not None
                saves.advance(busy=False)
                assert arrive(saves, group) == step
                assert find(tmp_path / "checkpoints", group) == (step, [])
            assert told == []
            if group.rank == 0:
                wait_for(lambda: [copy.step for copy in nodelocal.held(home)] == [3], "only the newest stays")

    all_good(run_ranks(2 * per_node, work))
    assert tiers_of(tmp_path / "checkpoints") == {1: ["shared"], 2: ["shared"], 3: ["local", "shared"]}


def stop_drainer(saves: Background, group: Any) -> None:
    """Have what is complete on the nodes stay there."""
    saves.reserve(content(0, group))
    assert saves.drain is not None and saves.drain._crew.worker.pid is not None
    os.kill(saves.drain._crew.worker.pid, signal.SIGSTOP)


def test_the_next_save_is_made_while_the_one_before_is_on_its_way(tmp_path: Path) -> None:
    def work(group: Any) -> None:
        with saving(tmp_path, group) as (saves, _):
            stop_drainer(saves, group)
            for step in (1, 2):
                saves.begin(content(step, group), step=step)
                saves.finish()
                saves.advance(busy=False)
            assert (saves.drain.step, saves.in_flight, saves.on_nodes) == (1, 2, 2)
            os.kill(saves.drain._crew.worker.pid, signal.SIGCONT)
            assert arrive(saves, group) == 1
            saves.advance(busy=False)
            assert (saves.drain.step, saves.in_flight) == (2, None)
            assert arrive(saves, group) == 2

    all_good(run_ranks(2, work))


@pytest.mark.parametrize("lost", [0, 1] if os.environ.get("CFE_TEST_FULL") else [1])
def test_a_node_that_is_lost_before_the_save_is_durable_costs_nothing(tmp_path: Path, lost: int) -> None:
    def work(group: Any) -> None:
        with saving(tmp_path, group) as (saves, _):
            stop_drainer(saves, group)
            saves.begin(content(1, group), step=1)
            saves.finish()

    all_good(run_ranks(3, work))
    shutil.rmtree(tmp_path / f"node-{lost}")
    assert bring(tmp_path / "checkpoints", tmp_path, 3) == (1, [])
    assert {step for step, _ in all_good(run_ranks(3, lambda group: find(tmp_path / "checkpoints", group)))} == {1}


def test_a_partner_that_is_gone_is_told_once_and_the_save_goes_on(tmp_path: Path) -> None:
    def work(group: Any) -> list[str]:
        with saving(tmp_path, group) as (saves, told):
            saves.reserve(content(0, group))
            if group.rank == 0:
                saves._crew.partner = {"host": "127.0.0.1", "port": 1}
            for step in (1, 2):
                saves.begin(content(step, group), step=step)
                saves.finish()
                saves.advance(busy=False)
                assert arrive(saves, group) == step
            return told

    for told in all_good(run_ranks(2, work)):
        assert told == ["checkpoint_partner: step 1: rank 0: Connection refused"]


def test_without_room_on_a_node_the_save_goes_straight_to_the_shared_filesystem(tmp_path: Path) -> None:
    def work(group: Any) -> list[str]:
        with saving(tmp_path, group, limit_bytes=1 << 30 if group.rank else 4096) as (saves, told):
            saves.begin(content(1, group), step=1)
            info = saves.finish()
            assert info is not None and info.step == 1 and saves.on_nodes is None
            home = node(tmp_path, group.rank).home
            wait_for(lambda: list(home.iterdir()) == [], "nothing stays on the nodes")
            return told

    for told in all_good(run_ranks(2, work)):
        assert len(told) == 1 and told[0].startswith("checkpoint_local: ") and "checkpoint.local_size" in told[0]
    assert {step for step, _ in all_good(run_ranks(2, lambda group: find(tmp_path / "checkpoints", group)))} == {1}


def test_a_node_whose_disk_fills_up_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a filesystem")
    # As if it had looked roomy enough.
    monkeypatch.setattr(background, "bytes_on_node", lambda *_: -(1 << 30))
    disk = tmp_path / "node-1"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True, timeout=20)

    def work(group: Any) -> list[str]:
        with saving(tmp_path, group) as (saves, told):
            saves.begin(content(1, group), step=1)
            assert saves.finish() is not None
            return told

    try:
        (disk / "fill").write_bytes(bytes(40_000))
        (first, _) = all_good(run_ranks(2, work))
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=20)
    assert "checkpoint_local: " in first[0] and "No space left on device" in first[0]


def test_a_writer_that_dies_costs_its_save(tmp_path: Path) -> None:
    def work(group: Any) -> None:
        with saving(tmp_path, group) as (saves, _):
            if group.rank == 1:
                os.kill(saves.writer_pid, signal.SIGKILL)
                wait_for(lambda: gone(saves.writer_pid), "gone")
            saves.begin(content(1, group), step=1)  # starts another
            assert saves.finish() is None and saves.on_nodes == 1
            if group.rank == 1:
                os.kill(saves.drain._crew.worker.pid, signal.SIGKILL)
            saves.advance(busy=False)
            saves.drain.wait()
            with contextlib.suppress(CheckpointError):
                saves.drain.advance(group, busy=False)
            saves.begin(content(2, group), step=2)
            saves.finish()
            saves.advance(busy=False)
            assert arrive(saves, group) == 2

    all_good(run_ranks(2, work))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_dies_on_the_way_to_the_nodes_costs_its_save_on_all_ranks(tmp_path: Path, victim: int) -> None:
    def work(group: Any) -> None:
        with saving(tmp_path, group) as (saves, told):
            saves.reserve(content(0, group))
            saves._crew.worker.wait()
            if group.rank == victim:
                os.kill(saves.writer_pid, signal.SIGSTOP)
            group.barrier()
            saves.begin(content(1, group), step=1)
            saves.settle()
            if group.rank == victim:
                os.kill(saves.writer_pid, signal.SIGKILL)
            with pytest.raises(CheckpointError, match="writer process has ended"):
                saves.finish()
            assert saves.in_flight is None and told == []
            saves.begin(content(2, group), step=2)
            assert saves.finish() is None and saves.on_nodes == 2

    all_good(run_ranks(2, work))


def test_what_is_abandoned_stays_on_the_nodes(tmp_path: Path) -> None:
    def work(group: Any) -> None:
        with saving(tmp_path, group) as (saves, _):
            stop_drainer(saves, group)
            saves.begin(content(1, group), step=1)
            saves.finish()
            saves.advance(busy=False)
            saves.drain.abandon(group)
            assert saves.drain.step is None
            saves.begin(content(2, group), step=2)
            saves.finish()
            saves.advance(busy=False)
            assert arrive(saves, group) == 2

    all_good(run_ranks(2, work))
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-000000002"]
