"""The order of windows: a bijection for any count, uniform, and the same for ever."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc.data.order import Permutation, window_at


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
@settings(deadline=None)
def test_permutes_any_count(count, seed, epoch):
    images = Permutation(count, seed=seed, epoch=epoch)(np.arange(count))
    assert sorted(images.tolist()) == list(range(count))


def test_positions_can_be_asked_for_alone_and_in_any_order():
    permutation = Permutation(1000, seed=3, epoch=1)
    whole = permutation(np.arange(1000))
    asked = np.array([999, 0, 500, 500])
    assert permutation(asked).tolist() == whole[asked].tolist()


def test_counts_beyond_32_bits():
    images = Permutation(2**40 + 1, seed=0, epoch=0)(np.arange(10_000))
    assert len(set(images.tolist())) == 10_000
    assert images.min() >= 0
    assert images.max() <= 2**40


def test_the_order_never_changes_between_versions():
    """A checkpoint holds a position in this order: changing it would repeat and skip windows on resume."""
    assert window_at(np.arange(8), 1000, seed=0).tolist() == [309, 25, 271, 657, 717, 286, 946, 362]
    assert window_at(np.arange(3, 13), 5, seed=42).tolist() == [2, 1, 4, 2, 1, 0, 3, 3, 0, 4]


def test_seed_epoch_and_count_each_give_another_order():
    orders = [
        Permutation(count, seed=seed, epoch=epoch)(np.arange(500)).tolist()
        for count, seed, epoch in itertools.product((500, 501), (0, 1), (0, 1))
    ]
    assert len({tuple(order) for order in orders}) == 8


def test_every_permutation_of_four_is_as_likely():
    trials = 24 * 80
    seen = Counter(tuple(Permutation(4, seed=seed, epoch=0)(np.arange(4)).tolist()) for seed in range(trials))
    chi_square = sum((seen[order] - 80) ** 2 / 80 for order in itertools.permutations(range(4)))
    assert chi_square < 49.7  # 23 degrees of freedom: a fair shuffle exceeds it once in a thousand


@pytest.mark.parametrize("count", [100, 1000, 65_537])
def test_images_are_uniform_and_unrelated_to_positions(count):
    positions = np.arange(count)
    moved = np.zeros((10, 10))
    correlations, steps = [], []
    for seed in range(50):
        images = Permutation(count, seed=seed, epoch=seed % 3)(positions)
        np.add.at(moved, (positions * 10 // count, images * 10 // count), 1)
        correlations.append(np.corrcoef(positions, images)[0, 1])
        steps.append(np.mean(np.diff(images) == 1))
    expected = moved.sum() / 100
    chi_square = ((moved - expected) ** 2 / expected).sum()
    assert chi_square < 126.1  # 81 degrees of freedom at most: once in a thousand
    assert abs(np.mean(correlations)) < 4 / np.sqrt(50 * count)
    assert np.mean(steps) < 3 / count  # neighbours stay neighbours once per permutation on average
