"""Saves on real filesystems that are full, read-only, dead, slow, stopped and taken away, or know no O_DIRECT."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_disks import Disk, ext4, mounted
from checkpoint_groups import all_good, run_ranks
from test_checkpoint_async import boundaries_until_saved, gone, saving, states, wait_for
from test_checkpoint_store import content, find, put

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.beside.background import Background
from cfe_hpc.checkpoints.beside.workers import Worker
from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.layout import CHUNK_BYTES
from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.store import Content, save
from cfe_hpc.errors import CheckpointError

STEP1 = "step-000000001"
POLICY = Retention(keep_last=3)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An ext4 of 32 MiB that becomes read-only at its first error."""
    with ext4(tmp_path / "disk", 32 << 20) as disk:
        yield disk


def failed_save(root: Path, moment: str, act: Callable[[], Any], *, step: int = 2) -> str:
    """Save, and do something at a moment of the save; what the failure of the save was."""

    def fault(now: str) -> None:
        if now == moment:
            act()

    with pytest.raises(CheckpointError) as failure:
        put(root, SoloGroup(), step, on_fault=fault)
    return str(failure.value)


def committed(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if not name.startswith("."))


@pytest.mark.parametrize(
    ("moment", "file"),
    [("draft-made", "shard-00000.bin"), ("data-written", "shard-00000.json"), ("index-written", "manifest.json")],
)
def test_a_disk_that_fills_up_at_any_point_costs_that_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, file: str
) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1400k", "tmpfs") as disk:
        root = disk.path / "checkpoints"
        put(root, SoloGroup(), 1)
        monkeypatch.setattr(drafts, "_MARGIN_BYTES", 0)
        assert failed_save(root, moment, disk.fill) == f"{file}: No space left on device"
        assert committed(root) == [STEP1]
        (disk.path / "ballast").unlink()
        assert find(root, SoloGroup()) == (1, [])
        put(root, SoloGroup(), 2)
        assert find(root, SoloGroup()) == (2, [])


@pytest.mark.parametrize("spare", range(4))
def test_a_disk_without_room_for_one_more_file(tmp_path: Path, spare: int) -> None:
    """The draft's folder, its data file, its index and its manifest need an entry each."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m,nr_inodes=32", "tmpfs") as disk:
        root = disk.path / "checkpoints"
        put(root, SoloGroup(), 1)
        for number in range(os.statvfs(disk.path).f_ffree - spare):
            (disk.path / f"{number}").touch()
        with pytest.raises(CheckpointError, match="No space left on device"):
            put(root, SoloGroup(), 2)
        assert committed(root) == [STEP1] and find(root, SoloGroup()) == (1, [])
        (disk.path / "0").unlink()
        with pytest.raises(CheckpointError) if spare < 3 else contextlib.nullcontext():
            put(root, SoloGroup(), 2)


@pytest.mark.parametrize("moment", ["draft-made", "data-written", "index-written", "manifest-written"])
@pytest.mark.parametrize("how", ["read-only", "dead"])
def test_a_disk_that_fails_at_any_point_costs_that_save_alone(disk: Disk, moment: str, how: str) -> None:
    root = disk.path / "checkpoints"
    put(root, SoloGroup(), 1)
    os.sync()
    why = failed_save(root, moment, disk.fail if how == "read-only" else disk.die)
    assert ("Read-only file system" if how == "read-only" else "Input/output error") in why
    with pytest.raises(CheckpointError):
        put(root, SoloGroup(), 3)
    if how == "read-only":
        assert committed(root)[0] == STEP1
        opened = Opened.at(root / STEP1, "run-1")
        opened.verify()


def test_what_a_dead_disk_held_is_there_when_it_is_back(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with ext4(tmp_path / "disk", 32 << 20) as disk:
        root = disk.path / "checkpoints"
        for step in (1, 2):
            put(root, SoloGroup(), step)  # durable on return, whatever comes
        failed_save(root, "data-written", disk.die, step=3)
        shutil.copy(image, tmp_path / "copy.img")
    with mounted(tmp_path / "back", "-o", "loop", str(tmp_path / "copy.img")) as disk:
        root = disk.path / "checkpoints"
        assert find(root, SoloGroup()) == (2, [])
        put(root, SoloGroup(), 3, attempt=1)
        assert find(root, SoloGroup(), attempt=2) == (3, [])
        assert committed(root) == [f"step-{step:09d}" for step in (1, 2, 3)]


@pytest.mark.parametrize("moment", ["draft-made", "data-written", "index-written", "manifest-written"])
@pytest.mark.parametrize("what", ["all checkpoints", "the draft"])
def test_a_folder_that_vanishes_meanwhile_fails_the_save_and_not_the_next(
    tmp_path: Path, moment: str, what: str
) -> None:
    root = tmp_path / "checkpoints"
    put(root, SoloGroup(), 1)

    def remove() -> None:
        for folder in [root] if what == "all checkpoints" else root.glob("*.tmp-*"):
            shutil.rmtree(folder)

    assert "No such file or directory" in failed_save(root, moment, remove) or moment == "index-written"
    put(root, SoloGroup(), 3)
    assert find(root, SoloGroup()) == (3, [])


def test_a_step_saved_again_stays_as_it_was_when_its_replacement_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On filesystems that cannot exchange two folders it takes two renames, and the second may fail."""
    put(tmp_path, SoloGroup(), 1)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name and Path(target).name == STEP1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_exchange", lambda one, other: False)
        patch.setattr(folders.os, "rename", refuse)
        with pytest.raises(CheckpointError, match="No space left on device"):
            put(tmp_path, SoloGroup(), 1, attempt=1)
    folders.sweep_trash(tmp_path)
    assert find(tmp_path, SoloGroup(), attempt=2) == (1, [])


def whole(step: int, size_bytes: int) -> Content:
    data = random.Random(step).randbytes(size_bytes)
    return Content(
        pieces=[Piece(name="w", dtype="uint8", shape=(size_bytes,), start=0, data=memoryview(data))], state=step
    )


def loaded(opened: Opened) -> bytes:
    (size_bytes,) = opened.reader.describe("w")[1]
    out = bytearray(size_bytes)
    opened.reader.enqueue("w", 0, memoryview(out))
    opened.reader.flush()
    return bytes(out)


def saved_well(root: Path, size_bytes: int, *, step: int = 1) -> None:
    """Save and load `size_bytes`, and compare."""
    save(root, whole(step, size_bytes), step=step, attempt=0, run_id="run-1", group=SoloGroup())
    opened = Opened.at(root / f"step-{step:09d}", "run-1")
    opened.verify()
    assert loaded(opened) == random.Random(step).randbytes(size_bytes)


SIZES = [0, 1, CHUNK_BYTES - 4096, CHUNK_BYTES - 4095, 2 * CHUNK_BYTES + 12345]
"""Of a tensor behind a header of 4096 bytes: none, one block, one chunk, one block more, several chunks."""


@pytest.mark.parametrize(
    "words", [["-t", "ramfs", "ramfs"], ["-t", "tmpfs", "tmpfs"]], ids=["without O_DIRECT", "tmpfs"]
)
def test_filesystems_in_memory_hold_what_is_written(tmp_path: Path, words: list[str]) -> None:
    with mounted(tmp_path / "disk", *words) as disk:
        if words[1] == "ramfs":
            with pytest.raises(OSError, match="Invalid argument"):
                os.open(disk.path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for step, size_bytes in enumerate(SIZES, 1):
            saved_well(disk.path / "checkpoints", size_bytes, step=step)


def test_disks_with_large_sectors_and_with_a_journal_of_data_hold_what_is_written(tmp_path: Path) -> None:
    # The first wants all of 4096 bytes aligned, the second takes O_DIRECT and does not heed it.
    for name, how in {"sectors": {"sector_bytes": 4096}, "journal": {"options": "data=journal"}}.items():
        with ext4(tmp_path / name, 96 << 20, **how) as disk:
            for step, size_bytes in enumerate(SIZES, 1):
                saved_well(disk.path / "checkpoints", size_bytes, step=step)


def test_writes_and_reads_that_do_less_than_they_were_asked_for_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, pwrite, preadv = random.Random(5), os.pwrite, os.preadv
    counts = {"short": 0}

    def part(size: int) -> int:
        counts["short"] += 1
        return max(1, rng.choice([size, size // 4096 // 2 * 4096, size // 512 // 3 * 512, size // 2, 1 << 20]))

    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: part(len(data))], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: part(len(views[0]))]], at))
    for step, size_bytes in enumerate(SIZES, 1):
        saved_well(tmp_path, size_bytes, step=step)
    assert counts["short"] > 20


def finish(saves: Background) -> str:
    """How the save in flight ended."""
    try:
        info = saves.finish()
    except CheckpointError as error:
        return str(error)
    assert info is not None
    return info.path.name


def stopped_writer(saves: Background) -> int:
    """The writer, stopped so that what is begun stays to be written."""
    saves.start()
    pid = saves.writer_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Disk.fill, "No space left on device"),
        (Disk.fail, "Read-only file system"),
        (Disk.die, "Input/output error"),
        (Disk.detach, "No such file or directory"),
        (lambda disk: shutil.rmtree(disk.path / "run"), "No such file or directory"),
    ],
    ids=["full", "read-only", "dead", "detached", "removed"],
)
def test_a_writer_tells_what_became_of_its_disk(disk: Disk, harm: Callable[[Disk], Any], words: str) -> None:
    root = disk.path / "run" / "checkpoints"
    root.parent.mkdir()
    with saving(root, SoloGroup()) as saves:
        saves.begin(content(1, SoloGroup()), step=1)
        assert finish(saves) == STEP1
        pid = stopped_writer(saves)
        saves.begin(content(2, SoloGroup()), step=2)
        harm(disk)
        os.kill(pid, signal.SIGCONT)
        why = finish(saves)
        assert words in why and "\n" not in why and saves.in_flight is None
    assert gone(pid)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_that_dies_just_before_it_is_asked_costs_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    attach = Worker.attach
    doomed: list[int] = []

    def die_first(worker: Worker) -> None:
        if worker.pid in doomed:
            os.kill(doomed.pop(), signal.SIGKILL)
            wait_for(lambda: gone(worker.pid or 0), "the writer is gone")
        attach(worker)

    monkeypatch.setattr(Worker, "attach", die_first)

    def work(group: Any) -> str:
        with saving(tmp_path, group) as saves:
            saves.start()
            if group.rank == rank:
                doomed.append(saves.writer_pid or 0)
            group.barrier()
            with pytest.raises(CheckpointError) as failure:
                saves.begin(content(1, group), step=1)
                saves.finish()
            saves.begin(content(2, group), step=2)
            assert finish(saves) == "step-000000002"
        return str(failure.value)

    assert len(set(all_good(run_ranks(2, work)))) == 1
    assert committed(tmp_path) == ["step-000000002"]


def test_a_disk_that_stands_still_stops_its_writer_and_not_the_steps(disk: Disk) -> None:
    root = disk.path / "checkpoints"
    with saving(root, SoloGroup()) as saves:
        pid = stopped_writer(saves)
        saves.begin(content(1, SoloGroup()), step=1)
        with disk.frozen():
            os.kill(pid, signal.SIGCONT)
            for _ in range(20):  # steps
                assert saves.busy() and saves.advance(busy=True) is None
                time.sleep(0.01)
        assert finish(saves) == STEP1
    assert find(root, SoloGroup()) == (1, [])


def test_a_rank_killed_on_a_disk_that_stands_still_takes_its_writer_along_when_it_can(disk: Disk) -> None:
    root = disk.path / "checkpoints"
    put(root, SoloGroup(), 1)
    reading, writing = os.pipe()
    rank = os.fork()
    if rank == 0:
        with contextlib.suppress(BaseException):
            saves = next(iter([Background(root=root, run_id="run-1", attempt=0, group=SoloGroup(), policy=POLICY)]))
            pid = stopped_writer(saves)
            saves.begin(content(2, SoloGroup()), step=2)
            os.write(writing, str(pid).encode())
            signal.pause()
        os._exit(1)
    try:
        writer = int(os.read(reading, 20))
        with disk.frozen():
            os.kill(writer, signal.SIGCONT)
            wait_for(lambda: "D" in states(writer), "stuck")
            os.kill(rank, signal.SIGKILL)
            os.waitpid(rank, 0)
        wait_for(lambda: gone(writer), "the writer is gone")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
        os.close(reading)
        os.close(writing)
    assert find(root, SoloGroup()) == (1, [])
    assert committed(root) == [STEP1]


def test_two_ranks_on_a_throttled_disk_save_as_fast_as_it_lets_them(disk: Disk) -> None:
    root, size_bytes = disk.path / "checkpoints", 3 << 20

    def work(group: Any) -> int:
        with saving(root, group) as saves:
            saves.start()
            saves.begin(whole(1, size_bytes), step=1)
            return boundaries_until_saved(saves, group, pause_s=0.005)

    with disk.throttled(8 << 20):
        steps = all_good(run_ranks(2, work))
    # Six MiB at eight a second: many steps were done meanwhile.
    assert steps[0] == steps[1] > 20
    assert loaded(Opened.at(root / STEP1, "run-1")) == random.Random(1).randbytes(size_bytes)
