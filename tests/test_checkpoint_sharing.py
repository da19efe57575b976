"""Ranks of one node read one checkpoint: each chunk once, whoever wants it, and nobody waits for one that is gone."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_groups import ThreadGroup, run_ranks

from cfe_hpc.checkpoints.io import neighbours, reads
from cfe_hpc.checkpoints.io.ahead import Ahead, Job
from cfe_hpc.checkpoints.io.neighbours import Board, Neighbours
from cfe_hpc.checkpoints.io.reads import Chunk, read_shared
from cfe_hpc.checkpoints.layout import CHUNK_BYTES
from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.store import Content, save
from cfe_hpc.errors import CorruptCheckpoint

RANKS = 3
NUM_CHUNKS = 5
WHOLE = random.Random(7).randbytes((NUM_CHUNKS - 1) * CHUNK_BYTES + 12345)


@contextmanager
def boards(members: int = 2, num_chunks: int = NUM_CHUNKS) -> Iterator[list[Board]]:
    """One board as each member has it."""
    first = os.memfd_create("board")
    fds = [first, *(os.open(f"/proc/self/fd/{first}", os.O_RDWR) for _ in range(members - 1))]
    yield [Board(fd, mine=mine, members=members, num_chunks=num_chunks) for mine, fd in enumerate(fds)]
    for fd in fds:
        os.close(fd)


def test_one_reads_what_two_want_and_the_other_takes_it() -> None:
    with boards() as (one, other):
        one.wish([0, 1])
        other.wish([1, 2])
        assert one.turn({0: None}, alone=False) == (0, None, False)  # nobody else wants it
        turn = one.turn({1: None}, alone=False)
        assert turn is not None and turn[1] is not None and not turn[2]
        one.place(turn[1])[:4] = b"read"
        assert other.turn({1: None}, alone=False) is None
        assert other.turn({1: None, 2: None}, alone=False) == (2, None, False)
        assert other.turn({1: None}, alone=True) == (1, None, False)
        one.done(turn, good=True)
        assert other.turn({1: None}, alone=False) == (1, turn[1], True)
        assert bytes(other.place(turn[1])[:4]) == b"read"


def test_what_one_could_not_read_the_other_tries() -> None:
    with boards() as (one, other):
        one.wish([1])
        other.wish([1])
        turn = one.turn({1: None}, alone=False)
        assert turn is not None
        one.done(turn, good=False)
        assert other.turn({1: None}, alone=False) == (1, None, False)


def test_a_place_is_kept_until_all_who_want_its_chunk_have_taken_it() -> None:
    with boards(num_chunks=100) as (one, other):
        left = dict.fromkeys(range(100))
        one.wish(list(left))
        other.wish(list(left))
        taken = []
        while (turn := one.turn(left, alone=False)) is not None:
            taken.append(turn)
            one.done(turn, good=True)
            del left[turn[0]]
        places = [place for _, place, _ in taken]
        assert len(places) == len(set(places)) < 100
        first = other.turn(dict.fromkeys(range(100)), alone=False)
        assert first == (*taken[0][:2], True)
        other.done(first, good=True)
        assert one.turn(left, alone=False) == (len(taken), places[0], False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    piece = Piece(name="t", dtype="uint8", shape=(len(WHOLE),), start=0, data=memoryview(WHOLE))
    root = tmp_path_factory.mktemp("sharing")
    return save(root, Content(pieces=[piece]), step=1, attempt=0, run_id="r", group=SoloGroup()).path


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks that were read from the disk, by any thread."""
    found: list[int] = []
    begin = Ahead._opened

    def opened(self: Ahead, job: Job) -> object:
        found.append(job.index)
        return begin(self, job)

    monkeypatch.setattr(Ahead, "_opened", opened)
    return found


def rows(rank: int, out: memoryview) -> list[tuple[int, memoryview]]:
    """A rank's third of each MiB of WHOLE, and the rest of that as zeros."""
    third = (1 << 20) // RANKS
    cuts = [(at, min(at + third, len(out))) for at in range(rank * third, len(out), 1 << 20)]
    return [(low, out[low:high]) for low, high in cuts]


def test_each_chunk_is_read_once_for_all_and_each_has_what_it_wants(folder: Path, scanned: list[int]) -> None:
    outs = [bytearray(len(WHOLE)) for _ in range(RANKS)]
    gate = threading.Barrier(RANKS)
    with boards(RANKS) as shared:

        def work(group: ThreadGroup) -> None:
            shard = Opened.at(folder)._shards[0]
            stretches = rows(group.rank, memoryview(outs[group.rank]))
            parts = [(4096 + at, out) for at, out in stretches]
            shared[group.rank].wish(range(NUM_CHUNKS))
            gate.wait()
            chunks = {index: Chunk(shard=shard, index=index, parts=parts) for index in range(NUM_CHUNKS)}
            read_shared(chunks, shared[group.rank])

        assert run_ranks(RANKS, work) == [None] * RANKS
    assert sorted(scanned) == list(range(NUM_CHUNKS))
    for rank, out in enumerate(outs):
        assert all(got == WHOLE[at : at + len(got)] for at, got in rows(rank, memoryview(out)))


def test_altered_bytes_are_told_to_every_rank(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with open(copy / "shard-00000.bin", "r+b") as data:
        data.seek(2 * CHUNK_BYTES + 5)
        byte = data.read(1)[0]
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([byte ^ 1]))
    with boards(RANKS) as shared:

        def work(group: ThreadGroup) -> None:
            shard = Opened.at(copy)._shards[0]
            read_shared({index: Chunk(shard=shard, index=index) for index in range(NUM_CHUNKS)}, shared[group.rank])

        for outcome in run_ranks(RANKS, work):
            assert isinstance(outcome, CorruptCheckpoint)
            assert f"bytes {2 * CHUNK_BYTES} to {3 * CHUNK_BYTES} differ" in str(outcome)


def test_a_neighbour_that_stands_still_is_not_waited_for_long(
    folder: Path, scanned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "_PATIENCE_S", 0.05)
    out = bytearray(len(WHOLE))
    with boards() as (one, other):
        for board in (one, other):
            board.wish(range(NUM_CHUNKS))
        assert other.turn(dict.fromkeys(range(NUM_CHUNKS)), alone=False) is not None  # and never done
        shard = Opened.at(folder)._shards[0]
        parts = [(4096, memoryview(out))]
        read_shared({index: Chunk(shard=shard, index=index, parts=parts) for index in range(NUM_CHUNKS)}, one)
    assert out == WHOLE
    assert sorted(scanned) == list(range(NUM_CHUNKS))


def test_those_of_one_node_meet_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "collapse", lambda memory: True)
    ranks = [Neighbours() for _ in range(3)]
    offers = [rank.offer() for rank in ranks]
    offers[1] = json.dumps(["another node", *json.loads(offers[1])[1:]]).encode()
    for number, rank in enumerate(ranks):
        rank.meet(offers, number, NUM_CHUNKS)
    one, far, other = (rank.board for rank in ranks)
    assert one is not None and far is None and other is not None
    one.wish([3])
    other.wish([3])
    turn = one.turn({3: None}, alone=False)
    assert turn is not None and turn[1] is not None
    assert other.turn({3: None}, alone=False) is None
    for rank in ranks:
        rank.close()


def test_without_huge_pages_each_reads_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "collapse", lambda memory: False)
    ranks = [Neighbours() for _ in range(2)]
    offers = [rank.offer() for rank in ranks]
    for number, rank in enumerate(ranks):
        rank.meet(offers, number, NUM_CHUNKS)
        assert rank.board is None
    for rank in ranks:
        rank.close()
