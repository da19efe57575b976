"""The base of every model that meets a file: strict, frozen, no unknown keys, durations and sizes spelt out."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

from cfe_hpc.units import format_duration, parse_duration_s, parse_size_bytes

__all__ = ["DURATION", "SIZE", "DurationS", "NoTruth", "SizeBytes", "Strict", "spelt", "unit_of"]


def _duration_s(value: Any) -> float:
    if not isinstance(value, (str, int, float)):
        raise ValueError('not a duration: write for example "4h" or "90m", in quotes')
    return parse_duration_s(value)


def _size_bytes(value: Any) -> int:
    if not isinstance(value, (str, int)):
        raise ValueError('not a size: write for example "64GiB", in quotes')
    return parse_size_bytes(value)


DURATION, SIZE = _duration_s, _size_bytes
"""What reads the values of the two types below."""

DurationS = Annotated[float, BeforeValidator(_duration_s)]
"""Seconds; written as "4h", "90m", "45s" or a number of seconds."""

SizeBytes = Annotated[int, BeforeValidator(_size_bytes)]
"""Bytes; written as "512GiB", "80GB", "16G" or a number of bytes."""


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):  # Python takes True for 1, Literal[1] included
        raise ValueError("must be a whole number")
    return value


NoTruth = BeforeValidator(_no_truth)
"""Beside a Literal of numbers: refuses true and false."""


class Strict(BaseModel):
    """A table of a file: unknown keys are refused, nothing is coerced, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, defer_build=True)


_SIZE_NAMES = {
    exponent: ((1024, f"{letter}iB"), (1000, f"{letter}B" if letter != "K" else "kB"))
    for exponent, letter in enumerate("KMGT", start=1)
}


def unit_of(field: FieldInfo) -> Literal["duration", "size"] | None:
    """What a number of this field measures; None for a plain value."""
    if _holds(field, _duration_s):
        return "duration"
    return "size" if _holds(field, _size_bytes) else None


def _holds(field: FieldInfo, read: Any) -> bool:
    # `DurationS` itself puts its validator among the field's metadata; `DurationS | None` keeps it in the annotation.
    nested = [piece for argument in get_args(field.annotation) for piece in get_args(argument)[1:]]
    return any(isinstance(piece, BeforeValidator) and piece.func is read for piece in [*field.metadata, *nested])


def spelt(field: FieldInfo, value: Any) -> Any:
    """A value of the field as people write it in a file, as far as that is exact: 14400.0 is "4h", 2**36 "64GiB"."""
    unit = unit_of(field)
    if unit is None or value is None:
        return value
    if unit == "duration":
        text = format_duration(value)
        return text if parse_duration_s(text) == value else value
    units = [(base**exponent, name) for exponent in (4, 3, 2, 1) for base, name in _SIZE_NAMES[exponent]]
    exact = (f"{value // unit}{name}" for unit, name in units if value and value % unit == 0)
    return min(exact, key=len, default=value)
