"""Cases of a package of tests, each with a Stage, that share one cluster: which there are, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from spine.stage import Stage, on_one_cluster

Cases = dict[str, Callable[[Stage], None]]

AT_A_TIME = 4


def cases_of(package: str) -> Cases:
    """Every case of a package beside this one, as "module.case": what its modules list in CASES."""
    folder = Path(__file__).resolve().parents[1] / package
    return {
        f"{module.name}.{case.__name__}": case
        for module in iter_modules([str(folder)])
        for case in import_module(f"{package}.{module.name}").CASES
    }


def outcomes_of(
    cases: Cases, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The outcome of each case that was chosen, by its name; all of them begin with the first one asked for.

    Args:
        request: of a module's fixture; its tests have a parameter `name`.
    """
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [str(item.callspec.params["name"]) for item in items if item.module is request.module]
    nodes = str(2 * AT_A_TIME + 2)
    root = tmp_path_factory.mktemp("cases")
    with on_one_cluster({name: cases[name] for name in chosen}, root, "--nodes", nodes, at_a_time=AT_A_TIME) as found:
        yield found
