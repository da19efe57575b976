"""Job arrays of a sweep: how tasks are split, and what is sent."""

from __future__ import annotations

import pytest

from cfe_hpc.launch.arrays import arrays


def _sent(tasks: range | list[int], array_max: int, max_parallel: int | None) -> list[tuple[int, str]]:
    return [(array.offset, array.option) for array in arrays(tasks, array_max=array_max, max_parallel=max_parallel)]


def test_one_array_takes_as_many_as_the_site_has_indices() -> None:
    assert _sent(range(1001), 1001, None) == [(0, "--array=0-1000")]
    assert _sent(range(1500), 1001, None) == [(0, "--array=0-1000"), (1001, "--array=0-498")]


def test_tasks_that_are_sent_again_keep_array_and_index() -> None:
    assert _sent([3, 4, 1003, 1500], 1001, None) == [(0, "--array=3-4"), (1001, "--array=2,499")]


@pytest.mark.parametrize(
    ("tasks", "max_parallel", "throttles"),
    [(12, 4, [2, 1, 1]), (12, 3, [1, 1, 1]), (10, 8, [4, 4]), (15, 100, [34, 33, 33]), (4, 3, [3])],
)
def test_a_throttle_is_divided_by_size_and_adds_up(tasks: int, max_parallel: int, throttles: list[int]) -> None:
    made = arrays(range(tasks), array_max=5, max_parallel=max_parallel)
    assert sorted(array.throttle or 0 for array in made) == sorted(throttles)
    assert sum(throttles) == max_parallel
    assert not any(array.waits for array in made)


def test_with_fewer_at_once_than_arrays_these_wait_for_one_another() -> None:
    made = arrays(range(12), array_max=5, max_parallel=2)
    assert [(array.throttle, array.waits) for array in made] == [(2, False), (2, True), (2, True)]
