"""Reads that a disk does ahead: the bytes that were written, or what is wrong with them, whatever the kernel can do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cfe_hpc.checkpoints.io import aio
from cfe_hpc.checkpoints.io.ahead import Ahead, Job
from cfe_hpc.checkpoints.io.reads import Chunk, read_all
from cfe_hpc.checkpoints.layout import CHUNK_BYTES
from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.store import Content, save
from cfe_hpc.errors import CorruptCheckpoint

WHOLE = os.urandom(5 * CHUNK_BYTES + 12345)
NUM_CHUNKS = 6
DATA = "shard-00000.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    piece = Piece(name="t", dtype="uint8", shape=(len(WHOLE),), start=0, data=memoryview(WHOLE))
    return save(tmp_path, Content(pieces=[piece]), step=1, attempt=0, run_id="r", group=SoloGroup()).path


def without_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "_idle", [])
    monkeypatch.setattr(aio.platform, "machine", lambda: "another")


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that has read a slice when the call for it returns, as it seems after the first job."""
    read = Ahead._read

    def reads(self: Ahead, queue: aio.Queue, reading: object) -> None:
        read(self, queue, reading)  # type: ignore[arg-type]
        self._at_once = aio.AT_ONCE

    monkeypatch.setattr(Ahead, "_read", reads)


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(aio.Queue, "read", read)


@pytest.mark.parametrize("kernel", [lambda _: None, without_queue, at_once, refused])
def test_what_was_written_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kernel: Callable[[pytest.MonkeyPatch], None]
) -> None:
    kernel(monkeypatch)
    shard = Opened.at(folder)._shards[0]
    out, told = bytearray(len(WHOLE)), list[int]()
    chunks = [Chunk(shard=shard, index=index, parts=[(4096, memoryview(out))]) for index in range(NUM_CHUNKS)]
    read_all(chunks, direct=True, progress=told.append)
    assert out == WHOLE
    assert sum(told) == shard.index.data_bytes and len(told) == NUM_CHUNKS


@pytest.mark.parametrize("kernel", [lambda _: None, without_queue, at_once, refused])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: os.truncate(path, 3 * CHUNK_BYTES - 4096), "truncated: it ends before byte"),
        (lambda path: path.unlink(), f"{DATA} is missing"),
        (lambda path: flip(path, 2 * CHUNK_BYTES + 77), f"bytes {2 * CHUNK_BYTES} to {3 * CHUNK_BYTES} differ"),
    ],
)
def test_the_first_chunk_that_is_not_as_written_is_told(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: Callable[[pytest.MonkeyPatch], None],
    spoil: Callable[[Path], None],
    what: str,
) -> None:
    kernel(monkeypatch)
    shard = Opened.at(folder)._shards[0]
    spoil(folder / DATA)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CorruptCheckpoint, match=what):
        read_all([Chunk(shard=shard, index=index) for index in range(NUM_CHUNKS)], direct=True)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as data:
        data.seek(at)
        byte = data.read(1)[0]
        data.seek(at)
        data.write(bytes([byte ^ 4]))


def test_another_copy_stands_in_for_an_altered_one(folder: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    near.mkdir()
    (near / DATA).write_bytes((folder / DATA).read_bytes())
    flip(near / DATA, CHUNK_BYTES + 1)
    manifest = Opened.at(folder).manifest
    shard = Opened(folder, manifest, places=lambda _: (near, folder))._shards[0]
    out, done = bytearray(CHUNK_BYTES), list[Exception | None]()

    def deliver(start: int, content: memoryview) -> None:
        out[start - CHUNK_BYTES : start - CHUNK_BYTES + len(content)] = content

    class One:
        def __init__(self) -> None:
            self.jobs = [Job(shard=shard, index=1, deliver=deliver, memory=None, done=done.append)]

        def next(self) -> Job | None:
            return self.jobs.pop() if self.jobs else None

        def ended(self) -> bool:
            return not self.jobs

    assert Ahead(One(), 4).run()
    assert done == [None]
    assert out == WHOLE[CHUNK_BYTES - 4096 : 2 * CHUNK_BYTES - 4096]
    assert [fault.partition(": ")[2] for fault in shard.faults] == [
        f"{DATA} is altered: bytes {CHUNK_BYTES} to {2 * CHUNK_BYTES} differ from their checksum"
    ]
