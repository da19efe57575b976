"""`[sweep]`: one job many times, each time with other values. What each task gets is in `config.axes`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cfe_hpc.config.base import Strict

__all__ = ["Sweep"]


class Sweep(Strict):
    """`[sweep]`: the axes of a sweep, and how tasks are made of them."""

    axes: dict[str, Any] = Field(
        min_length=1,
        description="keys of [params], [engine], [checkpoint], [recovery] or [metrics], each with the list of its "
        "values or a table that says how to make them: [sweeps.md](sweeps.md)",
        examples=['{ "params.lr" = [0.001, 0.0001] }'],
    )
    mode: Literal["grid", "zip", "random"] = Field(
        "grid",
        description="every combination, the last axis first; or the first values of all axes, then the second ones; or "
        "values drawn at random",
        examples=['"random"'],
    )
    samples: int | None = Field(None, ge=1, description="tasks of a random sweep", examples=["20"])
    seed: int = Field(0, description="of a random sweep: the same seed draws the same values", examples=["1"])
    max_parallel: int | None = Field(
        None,
        ge=1,
        description="tasks that may run at once; no limit when left out, but 1 on this machine",
        examples=["8"],
    )
