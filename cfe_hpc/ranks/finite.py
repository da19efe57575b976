"""Looking for a loss or a gradient that is not finite, without waiting for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["WATCHED", "Finite"]

WATCHED = ("loss", "grad_norm")
"""Names in `run.log` that are looked at."""


class Finite:
    """What one rank has logged since it last looked. No method is collective."""

    def __init__(self) -> None:
        self._noted: list[tuple[int, str, Any]] = []
        self._bad: tuple[int, str] | None = None

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep what `WATCHED` names, to be looked at later.

        Args:
            step: steps done once this one is.
            values: numbers or tensors of one element, which stay on their device.
        """
        for name in WATCHED:
            value = values.get(name)
            if value is not None:
                # Without the graph that it came of, which would be kept until somebody looks.
                self._noted.append((step, name, value.detach() if hasattr(value, "detach") else value))

    def first_bad(self) -> int | None:
        """Steps done with the first that gave a value that is not finite; None without one. Waits for the device.

        The answer stays the same until `forget`.
        """
        noted, self._noted = self._noted, []
        if self._bad is None:
            numbers = _numbers([value for _, _, value in noted])
            bad = [
                (step, f"{name} is {value}")
                for (step, name, _), value in zip(noted, numbers, strict=True)
                if not math.isfinite(value)
            ]
            self._bad = min(bad, default=None)
        return None if self._bad is None else self._bad[0]

    @property
    def what(self) -> str:
        """What was found: "loss is nan"; empty when nothing was."""
        return "" if self._bad is None else self._bad[1]

    def forget(self) -> None:
        """Forget what was noted and found: the run goes back."""
        self._noted, self._bad = [], None


def _numbers(values: list[Any]) -> list[float]:
    """The values as numbers; those on one device are fetched together, in fp32 or their own wider type."""
    numbers = [0.0] * len(values)
    waiting: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        device = getattr(value, "device", None)
        if device is None or device.type == "cpu":
            numbers[index] = float(value)
        else:
            waiting.setdefault(device, []).append(index)
    for indexes in waiting.values():
        import torch

        fetched = torch.stack([values[index].reshape(()).float() for index in indexes]).tolist()
        for index, number in zip(indexes, fetched, strict=True):
            numbers[index] = number
    return numbers
