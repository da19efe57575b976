"""The cases of tests/day_cases on the real Slurm: one cluster for all, a few at a time, a test for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from spine.stage import Stage, on_one_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

AT_A_TIME = 4

FOLDER = Path(__file__).resolve().parent / "day_cases"
CASES: dict[str, Callable[[Stage], None]] = {
    f"{module.name}.{case.__name__}": case
    for module in iter_modules([str(FOLDER)])
    for case in import_module(f"day_cases.{module.name}").CASES
}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The outcome of each case that was chosen, by its name; all of them begin with the first one asked for."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [str(item.callspec.params["name"]) for item in items if item.module is request.module]
    cases = {name: CASES[name] for name in chosen}
    nodes = str(2 * AT_A_TIME + 2)
    with on_one_cluster(cases, tmp_path_factory.mktemp("day"), "--nodes", nodes, at_a_time=AT_A_TIME) as found:
        yield found


@pytest.mark.parametrize("name", CASES)
def test_day(outcomes: dict[str, Future[None]], name: str) -> None:
    outcomes[name].result(timeout=550)
