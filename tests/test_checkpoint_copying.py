"""Copies by several threads: whole, told of in order, and refused when a thread cannot do its part."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cfe_hpc.checkpoints.beside.hand import Hand
from cfe_hpc.checkpoints.io.staging import Arena, Staged
from cfe_hpc.checkpoints.io.together import copy_together
from cfe_hpc.errors import CheckpointError

STRETCH_BYTES = 1 << 17  # large enough for the interpreter to be left to others
WAIT_S = 30.0


@pytest.fixture
def hands() -> Iterator[list[Hand]]:
    made = [Hand(f"test-{number}") for number in range(3)]
    yield made
    for hand in made:
        hand.close()


@pytest.mark.parametrize("helpers", [0, 1, 3])
@pytest.mark.parametrize("tasks", [0, 1, 2, 200])
def test_what_is_told_of_is_there(hands: list[Hand], helpers: int, tasks: int) -> None:
    data = [bytes([1 + number % 255]) * STRETCH_BYTES for number in range(tasks)]
    out = bytearray(STRETCH_BYTES * tasks)
    places = [memoryview(out)[at * STRETCH_BYTES : (at + 1) * STRETCH_BYTES] for at in range(tasks)]
    stretches = [[(place, memoryview(bytearray(each)))] for place, each in zip(places, data, strict=True)]
    told = 0
    for done in copy_together(stretches, hands[:helpers]):
        assert done >= told
        for at in range(told, done):
            assert places[at] == data[at], at
        told = done
    assert told == tasks and out == b"".join(data)


def test_a_helper_does_its_share_and_what_stops_it_is_raised(hands: list[Hand]) -> None:
    helped, wanted = threading.Event(), threading.Event()

    class Slow(list):
        """Stretches that this thread is kept busy with until the helper has taken the next."""

        def __iter__(self) -> Iterator:
            wanted.set()
            assert helped.wait(WAIT_S)
            return super().__iter__()

    class Broken(list):
        def __iter__(self) -> Iterator:
            helped.set()
            raise CheckpointError("no such memory")

    told = []
    with pytest.raises(CheckpointError, match="no such memory"):
        for done in copy_together([Slow(), Broken()], hands[:1]):
            told.append(done)
    assert wanted.is_set() and 2 not in told


def test_memory_that_another_save_has_by_now_is_not_written_out() -> None:
    arena = Arena()
    arena.reserve(1 << 16)
    first = Staged(arena, 1 << 16, arena.begin())
    assert not first.ready(1)
    arena.filled_bytes = 1 << 16
    assert first.ready(1 << 16)
    second = Staged(arena, 1 << 16, arena.begin())
    arena.filled_bytes = 1 << 16
    assert second.ready(1 << 16)
    with pytest.raises(CheckpointError, match="another save's bytes"):
        first.ready(1)
    arena.close()
