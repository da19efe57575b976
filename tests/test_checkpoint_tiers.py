"""Copies of checkpoints on nodes and their partners: what counts, what is brought home, what goes."""

from __future__ import annotations

import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_groups import all_good, run_ranks
from checkpoint_nodes import node, scatter
from test_checkpoint_async import wait_for
from test_checkpoint_store import find, put

from cfe_hpc.checkpoints import drafts
from cfe_hpc.checkpoints.beside.company import Company
from cfe_hpc.checkpoints.beside.nodewriter import NodeWriter
from cfe_hpc.checkpoints.io.staging import TAKEN_BACK, Arena, Staged
from cfe_hpc.checkpoints.layout import CHUNK_BYTES, Placement
from cfe_hpc.checkpoints.manifest import MANIFEST, ShardIndex
from cfe_hpc.checkpoints.tiers import nodelocal, partner, places
from cfe_hpc.checkpoints.tiers.partner import Receiver, Sending
from cfe_hpc.checkpoints.tiers.reclaim import reclaim
from cfe_hpc.errors import CheckpointError

SECRET = bytes(range(32))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def bring(root: Path, base: Path, size: int = 2, *, attempt: int = 1) -> tuple[int | None, list[str]]:
    """The step that is brought home by one rank a node, and what was reported; every rank agrees."""
    reports: list[str] = []

    def work(group) -> int | None:
        tier = node(base, group.rank)
        return reclaim(
            root, tier, run_id="run-1", attempt=attempt, group=group, report=lambda _, why: reports.append(why)
        )

    steps = set(all_good(run_ranks(size, work)))
    (step,) = steps
    return step, reports


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The shared folder, with step 1 of two ranks."""
    path = tmp_path / "checkpoints"
    all_good(run_ranks(2, lambda group: put(path, group, 1)))
    return path


def on_nodes(root: Path, base: Path, step: int, *, attempt: int = 0, **options) -> list[Path]:
    """A checkpoint of two ranks that only two nodes have; their folders of it."""
    all_good(run_ranks(2, lambda group: put(root, group, step, attempt=attempt)))
    return scatter(root / f"step-{step:09d}", *(node(base, number).home for number in range(2)), **options)


def resumed(root: Path, size: int = 2) -> set[int | None]:
    return {step for step, _ in all_good(run_ranks(size, lambda group: find(root, group, attempt=2)))}


def test_what_all_nodes_hold_together_is_brought_home(root: Path, tmp_path: Path) -> None:
    on_nodes(root, tmp_path, 2, partner=False)
    assert bring(root, tmp_path) == (2, [])
    assert resumed(root) == {2}
    assert bring(root, tmp_path) == (None, [])


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 3] if os.environ.get("CFE_TEST_FULL") else [3])
def test_without_one_node_its_partner_has_all(root: Path, tmp_path: Path, lost: int, size: int) -> None:
    on_nodes(root, tmp_path, 2)
    shutil.rmtree(tmp_path / f"node-{lost}")
    if size == 1:  # whichever node the one rank is given, it is the one that is left
        (tmp_path / f"node-{1 - lost}").rename(tmp_path / "node-x")
        (tmp_path / "node-x").rename(tmp_path / "node-0")
    assert bring(root, tmp_path, size) == (2, [])
    assert resumed(root, size) == {2}


def test_without_a_node_and_without_partner_the_one_before_is_used(root: Path, tmp_path: Path) -> None:
    on_nodes(root, tmp_path, 2, partner=False)
    shutil.rmtree(tmp_path / "node-1")
    assert bring(root, tmp_path) == (None, [])
    assert resumed(root) == {1}


def test_a_bad_copy_is_replaced_by_the_partners(root: Path, tmp_path: Path) -> None:
    first, second = on_nodes(root, tmp_path, 2)
    flip(first / "shard-00000.bin", 9000)
    flip(second / "shard-00001.json", 40)
    assert bring(root, tmp_path) == (2, [])
    assert resumed(root) == {2}


def test_two_bad_copies_of_a_shard_are_told_and_the_one_before_is_used(root: Path, tmp_path: Path) -> None:
    folders = on_nodes(root, tmp_path, 2)
    for folder in folders:
        flip(folder / "shard-00000.bin", 9000)
    step, reports = bring(root, tmp_path)
    assert step is None and len(reports) == 1 and reports[0].count("shard-00000.bin is altered") == 2
    assert resumed(root) == {1}
    assert [path.name for path in root.iterdir()] == ["step-000000001"]


def test_one_manifest_is_enough_and_none_is_too_few(root: Path, tmp_path: Path) -> None:
    first, second = on_nodes(root, tmp_path, 2)
    flip(first / MANIFEST, 40)
    content = (second / MANIFEST).read_bytes()
    (second / MANIFEST).unlink()
    assert bring(root, tmp_path) == (None, [])
    (second / MANIFEST).write_bytes(content)
    assert bring(root, tmp_path) == (2, [])


def test_what_was_deleted_on_the_shared_filesystem_stays_deleted(root: Path, tmp_path: Path) -> None:
    for folder in on_nodes(root, tmp_path, 2):
        nodelocal.mark_durable(folder)
    assert bring(root, tmp_path) == (None, [])
    # Damaged there it is another matter.
    (root / "step-000000002").mkdir()
    assert bring(root, tmp_path) == (2, [])
    assert resumed(root) == {2}


def test_what_another_attempt_has_overtaken_stays_on_the_nodes(root: Path, tmp_path: Path) -> None:
    on_nodes(root, tmp_path, 5, attempt=0)
    all_good(run_ranks(2, lambda group: put(root, group, 3, attempt=1)))
    assert bring(root, tmp_path, attempt=2) == (None, [])


def test_another_runs_copies_are_not_ours(root: Path, tmp_path: Path) -> None:
    all_good(run_ranks(2, lambda group: put(root, group, 2, run_id="run-2")))
    scatter(root / "step-000000002", *(node(tmp_path, number).home for number in range(2)))
    assert bring(root, tmp_path) == (None, [])


def test_a_shared_filesystem_that_takes_nothing_leaves_the_nodes_as_they_were(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = on_nodes(root, tmp_path, 2)
    monkeypatch.setattr("cfe_hpc.checkpoints.drafts.commit", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        bring(root, tmp_path)
    assert [path.name for path in root.iterdir()] == ["step-000000001"]
    assert all((folder / MANIFEST).exists() for folder in folders)


# What a node keeps


def test_durable_copies_go_but_for_the_newest_and_what_is_newer_stays(root: Path, tmp_path: Path) -> None:
    for step in (2, 3, 4):
        for folder in on_nodes(root, tmp_path, step):
            nodelocal.mark_durable(folder)
    on_nodes(root, tmp_path, 5)
    home = node(tmp_path, 0).home
    assert nodelocal.evict(home, 2, 0) == [2]
    assert [(copy.step, copy.durable) for copy in nodelocal.held(home)] == [(5, False), (4, True), (3, True)]
    assert nodelocal.evict(home, 0, 1) == [5, 4, 3]
    assert list(home.iterdir()) == []


def test_other_runs_folders_go_when_nobody_has_touched_them_for_long(tmp_path: Path) -> None:
    home = node(tmp_path, 0).home
    old, recent = home.with_name("run-old"), home.with_name("run-recent")
    for folder in (old, recent):
        (folder / "step-000000001.0-00000000").mkdir(parents=True)
    long_ago_s = time.time() - 8 * 86_400
    for folder in (old / "step-000000001.0-00000000", old, recent):
        os.utime(folder, (long_ago_s, long_ago_s))
    nodelocal.sweep_others(home)
    assert sorted(path.name for path in home.parent.iterdir()) == ["run-1", "run-recent"]


def test_room_is_asked_for_once_for_all_ranks_of_a_node(root: Path, tmp_path: Path) -> None:
    on_nodes(root, tmp_path, 2)
    home = node(tmp_path, 0).home
    (name,) = (path.name for path in home.iterdir())
    held_bytes = sum(path.stat().st_blocks * 512 for path in (home / name).iterdir())
    nodelocal.check_room(home, name, held_bytes, held_bytes)
    with pytest.raises(CheckpointError, match=r"checkpoint\.local_size allows"):
        nodelocal.check_room(home, "step-000000003.0-00000000", 4096, held_bytes + 4095)
    with pytest.raises(CheckpointError, match="are free"):
        nodelocal.check_room(home, name, 1 << 60, None)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    home = nodelocal.expand_home(str(tmp_path), "run-1", {})
    home.parent.mkdir()
    home.parent.chmod(0o777)
    with pytest.raises(CheckpointError, match="this user alone"):
        nodelocal.make_home(home)
    with pytest.raises(CheckpointError, match="variable SCRATCH is not set on this node"):
        nodelocal.expand_home("${SCRATCH}/x", "run-1", {})
    with pytest.raises(CheckpointError, match="no absolute path"):
        nodelocal.expand_home("x", "run-1", {})


def test_the_login_node_knows_where_checkpoints_lie(root: Path) -> None:
    places.record(root, 1, 0, "local", ["n1", "n2"])
    places.record(root, 2, 0, "local", ["n1", "n2"])
    places.record(root, 1, 0, "remote", ["file:///x"])
    places.record(root, 1, 0, "local", ["n1"], gone=True)
    with open(root / "tiers.ndjson", "a") as stream:
        stream.write('{"step": "x"}\n{"torn')
    assert places.tiers_of(root) == {1: ["shared", "remote"], 2: ["local"]}


# The partner


@pytest.fixture
def shard(root: Path, tmp_path: Path) -> Path:
    """A node's folder of step 2; rank 0's shard is sent from there."""
    return on_nodes(root, tmp_path / "from", 2)[0]


def staged(content: bytes, filled_bytes: int | None = None) -> tuple[Arena, Staged]:
    """A data file in an arena, of which so much, or all, is there."""
    arena = Arena()
    arena.reserve(len(content))
    arena.view(len(content))[:] = content
    arena.filled_bytes = len(content) if filled_bytes is None else filled_bytes
    return arena, Staged(arena, len(content))


def send(shard: Path, port: int, *, secret: bytes = SECRET, data: bytes | None = None, folder: str = "") -> str | None:
    content = (shard / "shard-00000.bin").read_bytes() if data is None else data
    to = {"host": "127.0.0.1", "port": port}
    arena, data_file = staged(content)
    try:
        index = (shard / "shard-00000.json").read_bytes()
        return Sending(to, secret, folder or shard.name, 0, data_file).finish(index)
    finally:
        arena.close()


def test_the_partner_has_the_very_bytes(shard: Path, tmp_path: Path) -> None:
    home = node(tmp_path, 7).home
    receiver = Receiver(home, SECRET)
    try:
        assert send(shard, receiver.port) is None
        for name in ("shard-00000.bin", "shard-00000.json"):
            assert (home / shard.name / name).read_bytes() == (shard / name).read_bytes()
        assert "shard-00000.bin: File exists" in str(send(shard, receiver.port))
    finally:
        receiver.close()
    assert send(shard, receiver.port) == "Connection refused"


def test_strangers_are_not_let_in_and_nobody_sends_to_one(shard: Path, tmp_path: Path) -> None:
    home = node(tmp_path, 7).home
    receiver = Receiver(home, SECRET)
    try:
        assert send(shard, receiver.port, secret=bytes(32)) == "the partner has closed the connection"
        assert list(home.iterdir()) == []
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            to = {"host": "127.0.0.1", "port": stranger.getsockname()[1]}
            arena, data = staged(b"secret")
            sending = Sending(to, SECRET, shard.name, 0, data)
            link, _ = stranger.accept()
            with link:
                link.sendall(bytes(32))
                greeting = link.recv(1000)
                link.sendall(bytes(32))
                assert sending.finish(b"") == "what listens there is no rank of this attempt"
                assert link.recv(1000) == b""
        assert len(greeting) == 64 and SECRET not in greeting
        arena.close()
    finally:
        receiver.close()


def test_what_arrives_is_compared_with_what_was_written(shard: Path, tmp_path: Path) -> None:
    receiver = Receiver(node(tmp_path, 7).home, SECRET)
    content = bytearray((shard / "shard-00000.bin").read_bytes())
    content[9000] ^= 1
    try:
        assert send(shard, receiver.port, data=bytes(content)) == "shard-00000.bin differs from what was sent"
        assert "no shard of a checkpoint" in str(send(shard, receiver.port, folder="../run-2"))
        other = "step-000000002.0-00000000"
        assert "shard-00000.json belongs to step-000000002.0-" in str(send(shard, receiver.port, folder=other))
    finally:
        receiver.close()


def test_a_partner_that_is_silent_is_given_up(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partner, "_CONNECT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert send(shard, silent.getsockname()[1]) == "TimeoutError: timed out"


def test_what_is_still_being_copied_is_sent_as_it_comes(shard: Path, tmp_path: Path) -> None:
    whole = (shard / "shard-00000.bin").read_bytes()
    index = ShardIndex.unseal((shard / "shard-00000.json").read_bytes(), "shard-00000.json")
    content = whole + bytes(CHUNK_BYTES)  # two chunks
    home, name = node(tmp_path, 6).home, "step-000000002.0-abcdef01"
    arena, data = staged(content, filled_bytes=CHUNK_BYTES)
    partner_home = node(tmp_path, 7).home
    receiver = Receiver(partner_home, SECRET)
    rank, writers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    writer = NodeWriter(arena, Company(writers_end))
    writer._secret = SECRET
    placement = Placement(size_bytes=len(content), extents=())
    identity = replace(index.identity, world_size=1, token="abcdef01")
    unwritten = drafts.unwritten_index(identity, 0, placement, num_shared=0, state=None)
    request = {"home": str(home), "node_bytes": len(content), "limit_bytes": None}
    request["partner"] = {"host": "127.0.0.1", "port": receiver.port}
    try:
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(writer._write_shard, request, unwritten, data)
            there = partner_home / name / "shard-00000.bin"
            try:
                wait_for(lambda: there.exists() and there.read_bytes()[: len(whole)] == whole, "the first chunk came")
            finally:
                arena.filled_bytes = len(content)
            assert written.result()[1] is None
        assert there.read_bytes() == content
    finally:
        rank.close()
        writers_end.close()
        receiver.close()
        arena.close()


def test_what_was_taken_back_is_sent_no_further(shard: Path, tmp_path: Path) -> None:
    arena, data = staged(bytes(2 * CHUNK_BYTES), filled_bytes=CHUNK_BYTES)
    home = node(tmp_path, 7).home
    receiver = Receiver(home, SECRET)
    try:
        sending = Sending({"host": "127.0.0.1", "port": receiver.port}, SECRET, shard.name, 0, data)
        wait_for((home / shard.name).exists, "begun")
        arena.filled_bytes = TAKEN_BACK
        assert "the state was changed while it was copied" in str(sending.finish(b""))
    finally:
        receiver.close()
        arena.close()
