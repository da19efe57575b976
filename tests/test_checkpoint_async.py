"""Saving beside training: the bytes are those of the step; what is killed, full or late costs no more than a save."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_groups import all_good, run_ranks
from test_checkpoint_store import content, find, small_disk

from cfe_hpc.checkpoints.beside.background import Background
from cfe_hpc.checkpoints.io.staging import Source
from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.store import Content, newest
from cfe_hpc.errors import CheckpointError, StagingError

KILLS = 24

__all__ = ["small_disk"]


@contextlib.contextmanager
def saving(
    root: Path, group: Any, *, keep_last: int = 3, keep_every_steps: int | None = None, **options: Any
) -> Iterator[Background]:
    policy = Retention(keep_last=keep_last, keep_every_steps=keep_every_steps)
    saves = Background(root=root, run_id="run-1", attempt=0, group=group, policy=policy, **options)
    try:
        yield saves
    finally:
        saves.close()


def states(pid: int) -> set[str]:
    """What the threads of a process do, as proc(5) tells it; nothing when it has ended, and is reaped."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends
            found.add(path.read_text().rpartition(")")[2].split()[0])
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended (and, if it was ours, is reaped)."""
    return states(pid) <= {"Z"}


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 30
    while not (answer := ready()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return answer


def test_what_is_saved_is_the_state_when_the_save_began(tmp_path: Path) -> None:
    def work(group: Any) -> list[int]:
        steps = []
        with saving(tmp_path, group, keep_last=2) as saves:
            saves.start()
            for step in (1, 2, 3):
                live = content(step, group)
                memory = [bytearray(piece.data) for piece in (*live.pieces, *live.own)]
                aliases = [
                    Piece(
                        name=piece.name, dtype=piece.dtype, shape=piece.shape, start=piece.start, data=memoryview(copy)
                    )
                    for piece, copy in zip((*live.pieces, *live.own), memory, strict=True)
                ]
                saves.begin(
                    Content(pieces=aliases[:1], own=aliases[1:], state=live.state, layout=live.layout), step=step
                )
                for copy in memory:
                    copy[:] = bytes(len(copy))
                assert saves.in_flight == step
                info = saves.finish()
                assert info is not None and saves.in_flight is None
                steps.append(info.step)
                assert find(tmp_path, group) == (step, [])
        return steps

    assert all_good(run_ranks(2, work)) == [[1, 2, 3]] * 2
    # What the writer took out it deletes when nobody waits for it.
    names = sorted(name for name in os.listdir(tmp_path) if not name.startswith(".trash-"))
    assert names == ["step-000000002", "step-000000003"]


def live(step: int, memory: bytearray, other: bytearray, **options: Any) -> Content:
    """A large piece that is steady, and a small one that is not."""
    pieces = [
        Piece(name="w", dtype="uint8", shape=(len(memory),), start=0, data=memoryview(memory), steady=True),
        Piece(name="b", dtype="uint8", shape=(len(other),), start=0, data=memoryview(other)),
    ]
    return Content(pieces=pieces, state=step, **options)


def read_back(root: Path, step: int) -> list[bytes]:
    opened = newest(root, run_id="run-1", attempt=1, group=SoloGroup())
    assert opened is not None and opened.step == step
    outs = []
    for name in ("w", "b"):
        out = bytearray(opened.reader.describe(name)[1][0])
        opened.reader.read_into(name, 0, memoryview(out))
        outs.append(bytes(out))
    return outs


def test_with_overlap_only_steady_pieces_wait_to_be_copied(tmp_path: Path) -> None:
    memory, other = bytearray(random.Random(1).randbytes(50 << 20)), bytearray(b"now" * 1000)
    before = [bytes(memory), bytes(other)]
    with saving(tmp_path, SoloGroup(), overlap=True) as saves:
        for step in (1, 2):
            memory[:], other[:] = before
            saves.begin(live(step, memory, other), step=step)
            other[:] = bytes(len(other))
            saves.settle()
            memory[:] = bytes(len(memory))
            assert saves.finish() is not None
            assert read_back(tmp_path, step) == before


def test_a_state_that_changed_while_it_was_copied_is_thrown_away(tmp_path: Path) -> None:
    memory, other = bytearray(b"x" * (20 << 20)), bytearray(b"y")
    with saving(tmp_path, SoloGroup(), overlap=True) as saves:
        saves.begin(live(1, memory, other), step=1)
        assert saves.finish() is not None
        saves.begin(live(2, memory, other, unchanged=lambda: False), step=2)
        with pytest.raises(CheckpointError, match="changed while it was copied, outside of an optimizer's step"):
            saves.finish()
        assert not saves.overlap
        assert sorted(os.listdir(tmp_path)) == ["step-000000001"]
        saves.begin(live(3, memory, other), step=3)
        memory[:] = bytes(len(memory))
        assert saves.finish() is not None
    assert read_back(tmp_path, 3) == [b"x" * (20 << 20), b"y"]


def test_a_rank_that_cannot_copy_costs_its_save_and_not_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Source.copy

    def refusing(self: Source, *words: Any) -> Iterator[int]:
        if broken.is_set():
            broken.clear()  # of one rank alone
            raise MemoryError("no memory is left")
        return copy(self, *words)

    broken = threading.Event()
    monkeypatch.setattr(Source, "copy", refusing)

    def work(group: Any) -> str:
        with saving(tmp_path, group) as saves:
            saves.start()
            for step in (1, 2, 3):
                group.barrier()
                if step == 2 and group.rank == 0:
                    broken.set()
                group.barrier()
                saves.begin(content(step, group), step=step)
                if step != 2:
                    assert saves.finish() is not None
                    assert find(tmp_path, group) == (step, [])
                    continue
                with pytest.raises(CheckpointError) as failed:
                    saves.finish()
                assert find(tmp_path, group) == (1, [])
        return str(failed.value)

    for told in all_good(run_ranks(2, work)):
        assert "no memory is left" in told
    assert sorted(os.listdir(tmp_path)) == ["step-000000001", "step-000000003"]


def boundaries_until_saved(saves: Background, group: Any, *, pause_s: float) -> int:
    """Steps of `pause_s` until the save in flight is committed."""
    boundaries, info = 0, None
    while info is None:
        info = saves.advance(bool(group.all_max([int(saves.busy())])[0]))
        boundaries += 1
        time.sleep(pause_s)
    return boundaries


def test_a_save_is_committed_at_boundaries_and_nothing_waits_there(tmp_path: Path) -> None:
    def work(group: Any) -> int:
        with saving(tmp_path, group) as saves:
            saves.start()
            saves.begin(content(1, group), step=1)
            return boundaries_until_saved(saves, group, pause_s=0.001)

    boundaries = all_good(run_ranks(2, work))
    assert boundaries[0] == boundaries[1] >= 2
    assert all_good(run_ranks(2, lambda group: find(tmp_path, group))) == [(1, [])] * 2


def test_state_that_grows_gets_more_memory_and_too_much_is_refused(tmp_path: Path) -> None:
    def piece(size: int) -> Content:
        return Content(
            pieces=[Piece(name="w", dtype="uint8", shape=(size,), start=0, data=memoryview(b"x" * size))], state=1
        )

    with saving(tmp_path, SoloGroup(), limit_bytes=8 << 20) as saves:
        for step, size in ((1, 1000), (2, 5 << 20), (3, 10)):
            saves.begin(piece(size), step=step)
            assert saves.finish() is not None
        with pytest.raises(StagingError, match=r"staging takes .* checkpoint\.staging_memory allows 8 MiB"):
            saves.begin(piece(9 << 20), step=4)
        assert saves.in_flight is None
    names = sorted(os.listdir(tmp_path))
    assert names == ["step-000000001", "step-000000002", "step-000000003"]
    opened = newest(tmp_path, run_id="run-1", attempt=1, group=SoloGroup())
    assert opened is not None and opened.step == 3


def test_a_disk_that_fills_up_fails_the_save_on_all_ranks_and_leaves_nothing(small_disk: Path) -> None:
    root = small_disk / "checkpoints"

    def fill_when_rank_0_has_written() -> None:
        wait_for(lambda: list(root.glob("*.tmp-*/shard-00000.json")), "rank 0's shard")
        with pytest.raises(OSError, match="No space"), open(small_disk / "fill", "ab", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))

    def work(group: Any) -> str:
        with saving(root, group) as saves:
            saves.begin(content(1, group), step=1)
            assert saves.finish() is not None
            writer = saves.writer_pid
            assert writer is not None
            if group.rank == 1:
                os.kill(writer, signal.SIGSTOP)
            saves.begin(content(2, group), step=2)
            if group.rank == 1:
                fill_when_rank_0_has_written()
                os.kill(writer, signal.SIGCONT)
            with pytest.raises(CheckpointError) as failure:
                saves.finish()
            group.barrier()
            if group.rank == 0:
                assert os.listdir(root) == ["step-000000001"]
                (small_disk / "fill").unlink()
            group.barrier()
            saves.begin(content(3, group), step=3)
            assert saves.finish() is not None
            return str(failure.value)

    messages = all_good(run_ranks(2, work))
    assert messages[0] == messages[1] and "No space left on device" in messages[0]


def test_writers_killed_at_any_moment_cost_a_save_and_nothing_else(tmp_path: Path) -> None:
    rng, saved, lost = random.Random(3), 0, 0
    with saving(tmp_path, SoloGroup(), keep_last=2) as saves:
        newest_step = 0
        for step in range(1, KILLS + 1):
            saves.begin(content(step, SoloGroup()), step=step)
            writer = saves.writer_pid
            assert writer is not None
            time.sleep(rng.uniform(0.0, 0.004) if step % 2 else rng.uniform(0.1, 0.3))
            if step % 4 == 3:  # in the middle of a commit, or after it
                wait_for(lambda: list(tmp_path.glob("*.tmp-*/shard-00000.json")) or not saves.busy(), "written")
                time.sleep(rng.uniform(0.0, 0.004))
            os.kill(writer, signal.SIGKILL)
            try:
                info = saves.finish()
                saved, newest_step = saved + 1, step
                assert info is not None and info.step == step
            except CheckpointError as error:
                lost += 1
                assert "the writer process has ended (signal 9)" in str(error)
            wait_for(lambda writer=writer: gone(writer), "the writer is gone")
            assert [name for name in os.listdir(tmp_path) if ".tmp-" in name and ".trash" not in name] == []
            assert find(tmp_path, SoloGroup()) == (newest_step or None, [])
    assert lost > KILLS // 4


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
