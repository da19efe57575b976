"""The cases of tests/recovery_cases on the real Slurm: one cluster for all, a few at a time, a test for each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from spine.cases import cases_of, outcomes_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

CASES = cases_of("recovery_cases")


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The outcome of each case that was chosen, by its name."""
    yield from outcomes_of(CASES, request, tmp_path_factory)


@pytest.mark.parametrize("name", CASES)
def test_recovery(outcomes: dict[str, Future[None]], name: str) -> None:
    outcomes[name].result(timeout=550)
