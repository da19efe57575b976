"""When preemptions come: the same instants for every way, from a seed."""

from __future__ import annotations

import random

__all__ = ["order", "preemptions_s"]


def preemptions_s(seed: int, count: int, mean_s: float) -> list[float]:
    """Seconds from the start of each allocation to its preemption; the allocation after the last one is left alone."""
    chosen = random.Random(f"preemptions {seed}")
    return [round(chosen.uniform(0.6, 1.4) * mean_s, 1) for _ in range(count)]


def order(seed: int, round_number: int, names: list[str]) -> list[str]:
    """The ways of a round, in random order."""
    return random.Random(f"order {seed} {round_number}").sample(names, len(names))
