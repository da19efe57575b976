"""The one-line form of every error a user meets."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc import errors
from cfe_hpc.errors import CfeError, ConfigError, ImpossibleError, Problem


def test_the_form() -> None:
    problem = Problem(file="jobs/x.toml", key="resources.nodes", what="must be at least 1", value=0, remedy="write 2")
    assert str(problem) == "jobs/x.toml: resources.nodes: must be at least 1 (0); write 2"


def test_no_key_and_no_value() -> None:
    assert str(Problem(file="x", key="", what="no such file", remedy="check the path")) == (
        "x: no such file; check the path"
    )


@settings(deadline=None)
@given(value=st.text(), key=st.text(), what=st.text())
def test_a_problem_is_one_line_whatever_it_holds(value: str, key: str, what: str) -> None:
    text = str(Problem(file="x", key=key, what=what, value=value, remedy="y"))
    assert "\n" not in text and text.splitlines() == [text]


def test_long_values_are_cut() -> None:
    assert len(str(Problem(file="x", key="k", what="w", value="v" * 5000, remedy="r"))) < 160


@pytest.mark.parametrize("kind", [ConfigError, ImpossibleError])
def test_all_problems_are_told_in_order(kind: type[ConfigError]) -> None:
    problems = [Problem(file="x", key=key, what="w", remedy="r") for key in "ab"]
    error = kind(problems)
    assert error.problems == tuple(problems)
    assert str(error).splitlines() == ["x: a: w; r", "x: b: w; r"]


def test_exit_codes_are_those_of_the_contract() -> None:
    codes = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, CfeError) and not name.startswith("_")
    }
    others = {"ConfigError": 2, "UsageError": 2, "PipelineError": 2, "SchedulerError": 3, "ImpossibleError": 4}
    assert codes == {name: others.get(name, 1) for name in codes}
    assert set(others) < set(codes)
