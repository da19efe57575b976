"""Durations and sizes, as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc.units import format_duration, format_seconds, format_size, parse_duration_s, parse_size_bytes, slurm_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("36h", 129_600.0),
        ("1h30m", 5_400.0),
        ("1h 30m", 5_400.0),
        ("1.5h", 5_400.0),
        ("1w2d3h4m5s", 788_645.0),
        ("250ms", 0.25),
        ("10M", 600.0),
        ("90", 90.0),
        ("0", 0.0),
        (90, 90.0),
        (0.5, 0.5),
        ("1-12:00:00", 129_600.0),
        ("02:30:00", 9_000.0),
        ("1-12:30", 131_400.0),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "h",
        "4 hours",
        "02:30",
        "1h30",
        "-5m",
        "5x",
        "1h,30m",
        "1e3",
        "\u0661h",
        -1,
        float("inf"),
        float("nan"),
        True,
    ],
)
def test_no_durations(text: str | float) -> None:
    with pytest.raises(ValueError):
        parse_duration_s(text)


@settings(deadline=None)
@given(st.integers(0, 10**9))
def test_whole_seconds_survive_being_written(seconds: int) -> None:
    assert parse_duration_s(format_duration(seconds)) == seconds
    assert parse_duration_s(slurm_time(seconds)) == seconds


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_duration_s(text) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00"), (59.2, "00:01:00"), (86_399, "23:59:59"), (131_400, "1-12:30:00")]
)
def test_slurm_time_rounds_up(seconds: float, text: str) -> None:
    assert slurm_time(seconds) == text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512GiB", 512 * 2**30),
        ("80 GB", 80 * 10**9),
        ("16G", 16 * 2**30),
        ("1.5k", 1536),
        ("1kB", 1000),
        ("100", 100),
        ("2TiB", 2 * 2**40),
        (7, 7),
    ],
)
def test_sizes(text: str | int, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "lots", "-1G", "1 gig", "1ZiB", -1, True])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ValueError):
        parse_size_bytes(text)


@settings(deadline=None)
@given(st.integers(0, 2**60))
def test_sizes_shown_are_within_half_a_percent(size_bytes: int) -> None:
    assert parse_size_bytes(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.0123, "0.012 s"), (0.41, "0.41 s"), (9.94, "9.9 s"), (9.96, "10 s"), (1234.5, "1234 s")],
)
def test_measured_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
