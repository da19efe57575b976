"""squeue's rows of arrays, expanded."""

from __future__ import annotations

from typing import Any

import pytest

from cfe_hpc.ranks.array_states import expanded, ranges, unranged


def _row(job_id: str, state: str) -> dict[str, Any]:
    return {"job_id": job_id, "state": state}


ROWS = {row["job_id"]: row for row in (_row("7_[5-6,9%2]", "PENDING"), _row("7_4", "RUNNING"), _row("8", "FAILED"))}


def test_an_array_asked_for_by_its_number_is_there_task_by_task_and_as_a_whole() -> None:
    states = {job_id: row["state"] for job_id, row in expanded(ROWS, {"7"}).items()}
    assert states == {"7_4": "RUNNING", "7_5": "PENDING", "7_6": "PENDING", "7_9": "PENDING", "7": "RUNNING"}
    assert expanded(ROWS, {"7"})["7_9"]["job_id"] == "7_9"


def test_a_task_and_a_plain_job_are_found_by_their_own_names() -> None:
    assert set(expanded(ROWS, {"7_6", "8"})) == {"7_6", "8"}
    assert expanded(ROWS, {"9"}) == {}


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3,7", [0, 1, 2, 3, 7]), ("5%4", [5]), ("0-6:3%2", [0, 3, 6]), ("", [])]
)
def test_ranges_are_read(text: str, numbers: list[int]) -> None:
    assert list(unranged(text)) == numbers


def test_ranges_are_written_as_they_are_read() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert list(unranged(ranges(range(0, 99, 7)))) == list(range(0, 99, 7))
