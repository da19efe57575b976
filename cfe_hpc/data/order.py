"""The order of windows: a keyed permutation of 0 … n-1, computed for any position alone, with no state.

A Feistel network over the smallest power of two that holds n (Luby and Rackoff, "How to construct pseudorandom
permutations", 1988), restricted to n by cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002); Mitchell et al., "Bandwidth-optimal random shuffling for GPUs" (2021), use the same for shuffling. The round
function is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014). This shuffles; it does not encrypt.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Permutation", "Positions", "window_at"]

Positions: TypeAlias = npt.NDArray[np.int64]
_Words: TypeAlias = npt.NDArray[np.uint64]

_ROUNDS = 8  # even, so that unequal halves end as they began; as many as one 64-byte digest has keys
_MIN_BITS = 6  # with halves of two bits a chi-square test told the permutations of four from fair ones


def _mix(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed


class Permutation:
    """A permutation of range(count), a pure function of (seed, epoch, count)."""

    def __init__(self, count: int, *, seed: int, epoch: int) -> None:
        assert count > 0
        self.count = count
        bits = max(_MIN_BITS, (count - 1).bit_length())
        self._widths = (bits // 2, bits - bits // 2)
        key = struct.pack("<QQQ", seed % 2**64, epoch, count)
        self._keys = np.frombuffer(hashlib.blake2b(key, person=b"cfe_hpc order").digest(), dtype="<u8")

    def __call__(self, positions: Positions) -> Positions:
        """Where each position (int64, 0 ≤ position < count, any number of them) is sent."""
        images = self._encrypt(positions.astype(np.uint64))
        outside = np.flatnonzero(images >= self.count)
        while outside.size:
            images[outside] = self._encrypt(images[outside])
            outside = outside[images[outside] >= self.count]
        return images.astype(np.int64)

    def _encrypt(self, words: _Words) -> _Words:
        left_bits, right_bits = self._widths
        left, right = words >> np.uint64(right_bits), words & np.uint64((1 << right_bits) - 1)
        for key in self._keys:
            mixed = _mix(right ^ key) >> np.uint64(64 - left_bits)
            left, right = right, left ^ mixed
            left_bits, right_bits = right_bits, left_bits
        joined: _Words = (left << np.uint64(right_bits)) | right
        return joined


def window_at(samples: Positions, count: int, *, seed: int) -> Positions:
    """Window of each global sample: sample s is the (s mod count)-th window of epoch s // count.

    Args:
        samples: global sample numbers, 0 or more, ascending; they may span epochs.
        count: number of windows, at least 1.
    """
    epochs, positions = np.divmod(samples, count)
    windows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = Permutation(count, seed=seed, epoch=int(epoch))(positions[here])
    return windows
