"""The base of every model that meets a file: strict, frozen, no unknown keys, durations and sizes spelt out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from cfe_hpc.units import parse_duration_s, parse_size_bytes

__all__ = ["DurationS", "SizeBytes", "Strict"]


def _duration_s(value: Any) -> float:
    if not isinstance(value, (str, int, float)):
        raise ValueError('not a duration: write for example "4h" or "90m", in quotes')
    return parse_duration_s(value)


def _size_bytes(value: Any) -> int:
    if not isinstance(value, (str, int)):
        raise ValueError('not a size: write for example "64GiB", in quotes')
    return parse_size_bytes(value)


DurationS = Annotated[float, BeforeValidator(_duration_s)]
"""Seconds; written as "4h", "90m", "45s" or a number of seconds."""

SizeBytes = Annotated[int, BeforeValidator(_size_bytes)]
"""Bytes; written as "512GiB", "80GB", "16G" or a number of bytes."""


class Strict(BaseModel):
    """A table of a file: unknown keys are refused, nothing is coerced, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
