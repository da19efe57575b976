"""Writers that are alive and do not get on: told from slow ones, given up, and replaced."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_disks import ext4
from checkpoint_groups import all_good, run_ranks
from test_checkpoint_async import gone, saving, states, wait_for
from test_checkpoint_store import content, find

from cfe_hpc.checkpoints.beside import hub, pulse, workers
from cfe_hpc.checkpoints.beside.company import Company
from cfe_hpc.checkpoints.beside.hub import Hub, Spoke
from cfe_hpc.checkpoints.beside.workers import Worker
from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.errors import CheckpointError

SECRET = bytes(range(32))


@pytest.fixture
def spoke(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Spoke]]:
    """Rank 0's end and rank 1's, with little patience."""
    for module in (hub, pulse):
        monkeypatch.setattr(module, "PULSE_S", 0.02)
        monkeypatch.setattr(module, "SILENCE_S", 1.0)
    end = Hub(SECRET)
    other = Spoke(("127.0.0.1", end.port), SECRET, 1)
    try:
        yield end, other
    finally:
        other.close()


def test_a_silent_writer_is_named_and_the_next_save_may_have_it_again(spoke: tuple[Hub, Spoke]) -> None:
    end, other = spoke
    beats: list[float] = []
    with pytest.raises(CheckpointError, match=r"rank 1: its writer has moved nothing for 1 s"):
        end.gather("one", "", 2, lambda: beats.append(time.monotonic()))
    assert len(beats) > 3  # its own rank hears that it gets on
    other.say("two", facts="x")
    assert end.gather("two", "y", 2, lambda: None) == [b"y", b"x"]


def test_a_slow_writer_is_waited_for_while_it_gets_on(spoke: tuple[Hub, Spoke]) -> None:
    end, other = spoke
    slow = pulse.Pulse(other.beat)

    def write() -> None:
        until_s = time.monotonic() + 1.5
        while time.monotonic() < until_s:
            slow.beat()
            time.sleep(0.01)
        other.say("one", facts="x")

    thread = threading.Thread(target=write)
    thread.start()
    assert end.gather("one", "y", 2, lambda: None) == [b"y", b"x"]
    thread.join()


def test_a_rank_waits_for_its_writer_while_that_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "PULSE_S", 0.02)
    worker = Worker(silence_s=0.5)
    rank, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    company = Company(its_end)

    def write() -> None:
        for _ in range(100):
            company.beat()
            time.sleep(0.01)
        its_end.send(b'{"written": true}')

    with rank, its_end:
        worker._link = rank
        worker.ask({"do": "write"})
        thread = threading.Thread(target=write)
        thread.start()
        assert worker.answer() == {"written": True}
        thread.join()
        worker._link = None
    worker.close()


def test_nobody_waits_for_a_killed_writer_that_waits_for_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_KILLED_S", 0.1)
    with ext4(tmp_path / "disk", 16 << 20) as disk, saving(disk.path, SoloGroup()) as saves:
        saves.reserve(content(0, SoloGroup()))
        worker, pid = saves._crew.worker, saves.writer_pid
        worker.wait()
        with disk.frozen():
            saves.begin(content(1, SoloGroup()), step=1)
            saves.settle()
            wait_for(lambda: "D" in states(pid), "it waits")
            killing = threading.Thread(target=worker.kill, daemon=True)
            killing.start()
            killing.join(20)
            assert not killing.is_alive() and not gone(pid)
        wait_for(lambda: gone(pid), "gone")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_stands_still_costs_its_save_and_not_the_next(tmp_path: Path, victim: int) -> None:
    def work(group: Any) -> None:
        with saving(tmp_path, group) as saves:
            saves.reserve(content(0, group))
            saves._crew.worker.wait()
            pid = saves.writer_pid
            if group.rank == victim:
                saves._crew.worker._silence_s = 0.5
                os.kill(pid, signal.SIGSTOP)
            group.barrier()
            saves.begin(content(1, group), step=1)
            with pytest.raises(
                CheckpointError, match="the writer process has moved nothing" if victim == 0 else "rank 1"
            ):
                saves.finish()
            if group.rank == victim:
                wait_for(lambda: gone(pid), "gone")
                saves._crew.worker._silence_s = 600.0
            saves.begin(content(2, group), step=2)
            info = saves.finish()
            assert info is not None and info.step == 2

    all_good(run_ranks(2, work))
    assert {step for step, _ in all_good(run_ranks(2, lambda group: find(tmp_path, group)))} == {2}
