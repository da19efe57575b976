"""Durations and sizes as people write them: "36h", "1h30m", "90" (seconds), "512GiB", "16G"; times as programs do.

Sizes follow IEC where it is spelt (KiB, MiB …, powers of 1024) and SI otherwise (kB, MB, GB: powers of
1000); a bare letter (K, M, G, T) is Slurm's, a power of 1024. Bare numbers are seconds and bytes.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

__all__ = [
    "epoch_s",
    "format_count",
    "format_duration",
    "format_seconds",
    "format_size",
    "parse_count",
    "parse_duration_s",
    "parse_size_bytes",
    "slurm_time",
]

_DURATION_UNITS = {"w": 604_800.0, "d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|[wdhms])", re.IGNORECASE | re.ASCII)
_SLURM_CLOCK = re.compile(r"^(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?$", re.ASCII)
_COUNT = re.compile(r"^(\d+(?:\.\d+)?)([KMBT]?)$", re.ASCII)
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)\s*$", re.IGNORECASE | re.ASCII)


def parse_duration_s(text: str | int | float) -> float:
    """Seconds of a duration: "36h", "1h30m", "250ms", Slurm's "1-12:00:00" and "02:30:00", or a number.

    Raises:
        ValueError: the text is no duration, or negative.
    """
    if isinstance(text, bool):
        raise ValueError("not a duration")
    if isinstance(text, (int, float)):
        if not 0 <= text < float("inf"):
            raise ValueError("a duration is a finite number of seconds, zero or more")
        return float(text)
    stripped = text.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", stripped):
        return float(stripped)
    clock = _SLURM_CLOCK.match(stripped)
    if clock:
        days, first, second, third = clock.groups()
        if days is None and third is None:
            raise ValueError("ambiguous: write hours:minutes:seconds, or a unit such as 90m")
        return int(days or 0) * 86_400.0 + int(first) * 3_600.0 + int(second) * 60.0 + int(third or 0)
    total, position = 0.0, 0
    for part in _DURATION_PART.finditer(stripped):
        if part.start() != position:
            break
        total += float(part.group(1)) * _DURATION_UNITS[part.group(2).lower()]
        position = part.end()
    if position == 0 or position != len(stripped):
        raise ValueError('not a duration: write for example "36h", "1h30m", "45s" or "1-12:00:00"')
    return total


def format_duration(seconds: float) -> str:
    """The shortest exact spelling in days, hours, minutes and whole seconds: 5400 is "1h30m"; 0.25 is "250ms"."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    rest, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def format_seconds(seconds: float) -> str:
    """A measured time in seconds, with no more digits than it is worth: "0.41 s", "3.5 s", "210 s"."""
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"


def slurm_time(seconds: float) -> str:
    """Slurm's spelling of a time limit, D-HH:MM:SS, rounded up to whole seconds."""
    whole = int(-(-seconds // 1))
    days, rest = divmod(whole, 86_400)
    clock = f"{rest // 3_600:02d}:{rest % 3_600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def epoch_s(stamp: Any) -> float | None:
    """Seconds since the epoch of an RFC 3339 time, or of Slurm's, which is this machine's local time.

    None for anything else, such as Slurm's "Unknown" and "None".
    """
    try:
        return datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def parse_size_bytes(text: str | int) -> int:
    """Bytes of a size: "512GiB", "80 GB", Slurm's "16G" (1024³), or a whole number of bytes.

    Raises:
        ValueError: the text is no size, or negative.
    """
    if isinstance(text, bool):
        raise ValueError("not a size")
    if isinstance(text, int):
        if text < 0:
            raise ValueError("a size is zero or more bytes")
        return text
    match = _SIZE.match(text)
    if not match:
        raise ValueError('not a size: write for example "512GiB", "80GB" or "16G"')
    number, prefix, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024
    exponent = " kmgtp".index(prefix.lower() or " ")
    return round(float(number) * float(base**exponent))


def parse_count(text: str) -> int:
    """A number of things as people say it: "350M" is 350 million, "7B" 7 thousand million.

    Raises:
        ValueError: the text is none.
    """
    match = _COUNT.match(text)
    if not match:
        raise ValueError('not a number: write for example "350M" or "7B"')
    return round(float(match[1]) * 1000.0 ** " KMBT".index(match[2] or " "))


def format_count(count: float) -> str:
    """A number of things for people, with three digits or so: 7241732096 is "7.24B"."""
    value, unit = float(count), ""
    for unit in ("", "K", "M", "B", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def format_size(size_bytes: float) -> str:
    """A size for people, in IEC units with three digits or so: 1610612736 is "1.5 GiB"."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 999.5 else f"{value:.3g} {unit}"
