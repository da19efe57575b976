"""How bytes get into a data file: the kernel's asynchronous I/O, its stand-in, and the memory that they come from."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.io import aio, hugepages, streaming
from cfe_hpc.checkpoints.io.aio import Queue
from cfe_hpc.checkpoints.io.hugepages import HugePages
from cfe_hpc.checkpoints.io.memory import HUGE_BYTES, allocate, collapse, page_buffer, shared_pages
from cfe_hpc.checkpoints.io.shard import write_data
from cfe_hpc.checkpoints.io.staging import TAKEN_BACK, Arena, Staged, copy_threads
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, CHUNK_BYTES
from cfe_hpc.errors import CheckpointError

SIZE_BYTES = 9 * CHUNK_BYTES + 3 * BLOCK_BYTES
"""More chunks than are in flight at a time, and a part of one."""


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena()
    made.reserve(SIZE_BYTES)
    content = made.view(SIZE_BYTES)
    for at in range(0, SIZE_BYTES, BLOCK_BYTES):
        content[at : at + 8] = at.to_bytes(8, "little")
    made.filled_bytes = SIZE_BYTES
    yield made
    made.close()


def sums_of(content: memoryview) -> tuple[int, ...]:
    return tuple(crc32c(content[at : at + CHUNK_BYTES]) for at in range(0, len(content), CHUNK_BYTES))


@pytest.mark.parametrize("beside", [True, False])
def test_what_lies_in_an_arena_is_written_and_summed(
    arena: Arena, tmp_path: Path, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not beside:
        monkeypatch.setattr(aio, "_idle", [])
        monkeypatch.setattr(aio.platform, "machine", lambda: "another")
    path = tmp_path / "data"
    assert write_data(path, Staged(arena, SIZE_BYTES)) == sums_of(arena.view(SIZE_BYTES))
    assert path.read_bytes() == arena.view(SIZE_BYTES)


def test_a_queue_serves_one_file_after_the_other_and_none_that_has_failed(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle: list[Queue] = []
    monkeypatch.setattr(aio, "_idle", idle)
    write_data(tmp_path / "one", Staged(arena, SIZE_BYTES))
    before = list(idle)
    write_data(tmp_path / "two", Staged(arena, SIZE_BYTES))
    assert idle == before and len(idle) <= 1  # none where the filesystem does nothing beside
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    arena.filled_bytes = TAKEN_BACK
    with pytest.raises(CheckpointError):
        write_data(tmp_path / "three", Staged(arena, SIZE_BYTES))
    assert idle == []


def test_the_writer_follows_what_is_still_being_filled(arena: Arena, tmp_path: Path) -> None:
    arena.filled_bytes = 0

    def fill() -> None:
        for end in itertools.count(CHUNK_BYTES // 2, CHUNK_BYTES // 2):
            arena.filled_bytes = min(end, SIZE_BYTES)
            if end >= SIZE_BYTES:
                return
            time.sleep(0.002)

    filling = threading.Thread(target=fill)
    filling.start()
    assert write_data(tmp_path / "data", Staged(arena, SIZE_BYTES)) == sums_of(arena.view(SIZE_BYTES))
    filling.join()


def test_what_is_taken_back_is_not_written(arena: Arena, tmp_path: Path) -> None:
    arena.filled_bytes = 2 * CHUNK_BYTES
    timer = threading.Timer(0.05, lambda: setattr(arena, "filled_bytes", TAKEN_BACK))
    timer.start()
    with pytest.raises(CheckpointError, match="changed while it was copied"):
        write_data(tmp_path / "data", Staged(arena, SIZE_BYTES))
    timer.join()


def test_a_filesystem_that_writes_at_once_is_written_to_on_threads(
    arena: Arena, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, on_threads = [], streaming._on_threads
    monkeypatch.setattr(streaming, "_is_direct", lambda fd: True)
    monkeypatch.setattr(streaming, "_on_threads", lambda *args: asked.append(1) or on_threads(*args))
    path = memory_folder / "data"
    assert write_data(path, Staged(arena, SIZE_BYTES)) == sums_of(arena.view(SIZE_BYTES))
    assert asked == [1] and path.read_bytes() == arena.view(SIZE_BYTES)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    path = Path(f"/dev/shm/cfe-test-{os.getpid()}")
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def test_requests_are_done_beside_and_errors_are_told_of_each(tmp_path: Path) -> None:
    out, back = page_buffer(4 * BLOCK_BYTES), page_buffer(4 * BLOCK_BYTES)
    out[:] = bytes(range(256)) * (len(out) // 256)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with contextlib.closing(Queue(depth=4)) as queue:
        for at in range(0, len(out), BLOCK_BYTES):
            queue.write(fd, out[at : at + BLOCK_BYTES], at, tag=at)
        done = []
        while len(queue):
            done += queue.done()
        assert sorted(done) == [(at, BLOCK_BYTES) for at in range(0, len(out), BLOCK_BYTES)]
        assert queue.done() == []
        queue.read(fd, back, 0, tag=1)
        queue.read(fd, page_buffer(BLOCK_BYTES), len(out), tag=2)
        done = [*queue.done(), *queue.done()]
        assert sorted(done) == [(1, len(out)), (2, 0)] and back == out
        os.close(fd)
        with pytest.raises(OSError) as caught:
            queue.write(fd, out, 0, tag=3)
        assert caught.value.errno == errno.EBADF and len(queue) == 0


def test_a_machine_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio.platform, "machine", lambda: "another")
    with pytest.raises(OSError, match="not implemented"):
        Queue(1)


def test_huge_pages_keep_what_lies_in_them(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    before, pages = bytes(arena.view(SIZE_BYTES)), HugePages()
    asked: list[int] = []

    def told(memory: memoryview) -> bool:
        asked.append(len(memory))
        return collapse(memory)

    monkeypatch.setattr(hugepages, "collapse", told)
    pages.gather(arena.memory)
    pages.held(lambda request: dict(request))({})
    assert pages._thread is not None
    pages._thread.join(30)
    # A kernel that has none is asked once.
    assert asked == [HUGE_BYTES] * len(asked) and len(asked) in (1, len(arena.memory) // HUGE_BYTES)
    assert arena.view(SIZE_BYTES) == before


@pytest.mark.parametrize("patience_s", [60.0, -1.0])
def test_memory_is_there_in_huge_pages_or_small_ones(monkeypatch: pytest.MonkeyPatch, patience_s: float) -> None:
    monkeypatch.setattr("cfe_hpc.checkpoints.io.memory._PATIENCE_S", patience_s)
    fd = os.memfd_create("cfe-test-pages")
    all_huge = allocate(fd, 0, 2 * HUGE_BYTES)
    os.pwrite(fd, b"stays", HUGE_BYTES - 2)
    more_are_huge = allocate(fd, 2 * HUGE_BYTES, 6 * HUGE_BYTES)
    assert os.fstat(fd).st_blocks * 512 == os.fstat(fd).st_size == 6 * HUGE_BYTES
    assert os.pread(fd, 5, HUGE_BYTES - 2) == b"stays" and os.pread(fd, 1, 5 * HUGE_BYTES) == b"\0"
    mapped = shared_pages(fd, 6 * HUGE_BYTES)
    _, _, smaps = Path("/proc/self/smaps").read_text().partition("cfe-test-pages")
    in_huge_pages = next(line for line in smaps.splitlines() if line.startswith("ShmemPmdMapped:"))
    if patience_s < 0:
        assert not all_huge and not more_are_huge
    if all_huge and more_are_huge:
        assert in_huge_pages.split()[1] == str(6 * HUGE_BYTES // 1024)
    mapped.release()
    os.close(fd)


def test_shared_memory_is_unmapped_when_nobody_looks_at_it() -> None:
    fd = os.memfd_create("cfe-test-pages")
    os.ftruncate(fd, 3 * HUGE_BYTES)
    memory = shared_pages(fd, 3 * HUGE_BYTES)
    part = memory[HUGE_BYTES:]
    part[:3] = b"abc"
    assert os.pread(fd, 3, HUGE_BYTES) == b"abc"
    memory.release()
    assert "cfe-test-pages" in Path("/proc/self/maps").read_text()
    part.release()
    assert "cfe-test-pages" not in Path("/proc/self/maps").read_text()
    os.close(fd)
    with pytest.raises(OSError):
        shared_pages(fd, HUGE_BYTES)


@pytest.mark.parametrize(
    ("mine", "of_node", "ranks_here", "threads"),
    [(2, 2, 1, 2), (2, 2, 2, 1), (2, 2, 4, 1), (64, 64, 4, 4), (8, 64, 8, 4), (1, 64, 8, 1), (3, 64, 8, 3)],
)
def test_ranks_share_the_cores_that_none_has_for_itself(
    mine: int, of_node: int, ranks_here: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mine)))
    monkeypatch.setattr(os, "cpu_count", lambda: of_node)
    assert copy_threads(ranks_here) == threads
