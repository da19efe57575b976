"""Axes to tasks: what each task gets, and what is told of axes that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cfe_hpc.config.load import Loaded, load, sweep_table
from cfe_hpc.config.sweep_rules import read_tasks, task_job
from cfe_hpc.config.tasks import Tasks
from cfe_hpc.errors import ConfigError


def _load(folder: Path, *axes: str, sets: tuple[str, ...] = (), **tables: Any) -> Loaded:
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps({"name": "job", "command": ["true"], **tables}))
    return load(str(path), None, sets, {}, sweep=sweep_table(axes))


def _tasks(loaded: Loaded) -> Tasks:
    assert loaded.job.sweep is not None
    return read_tasks(loaded.job.sweep)


def _values(loaded: Loaded) -> list[tuple[Any, ...]]:
    tasks = _tasks(loaded)
    return [tuple(tasks.values(number).values()) for number in range(tasks.tasks)]


def test_a_grid_takes_every_combination_the_last_axis_first(tmp_path: Path) -> None:
    loaded = _load(tmp_path, "params.lr=0.1,0.2", "engine.zero_stage=0,1,2")
    assert _values(loaded) == [(0.1, 0), (0.1, 1), (0.1, 2), (0.2, 0), (0.2, 1), (0.2, 2)]
    job = task_job(loaded.job, _tasks(loaded), 4)
    assert (job.params["lr"], job.engine.zero_stage, job.sweep) == (0.2, 1, None)


def test_zip_takes_the_first_of_each_then_the_second(tmp_path: Path) -> None:
    assert _values(_load(tmp_path, "params.a=1,2", "params.b=x,y", sets=("sweep.mode=zip",))) == [(1, "x"), (2, "y")]


def test_a_random_sweep_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    axes = ("params.lr={log_uniform=[1e-5, 1e-1]}", "params.n={integer=[1, 4]}", "params.f=relu,gelu")
    sets = ("sweep.mode=random", "sweep.samples=30")
    first = _values(_load(tmp_path, *axes, sets=sets))
    assert first == _values(_load(tmp_path, *axes, sets=sets))
    assert first != _values(_load(tmp_path, *axes, sets=(*sets, "sweep.seed=1")))
    assert len(first) == 30
    assert all(1e-5 <= lr <= 1e-1 and n in (1, 2, 3, 4) and f in ("relu", "gelu") for lr, n, f in first)
    assert {f for _, _, f in first} == {"relu", "gelu"}


def test_a_range_leaves_its_end_out_and_words_make_no_axis_of_their_own(tmp_path: Path) -> None:
    assert _values(_load(tmp_path, "params.seed={range=[0, 10, 4]}")) == [(0,), (4,), (8,)]
    loaded = _load(tmp_path, sweep={"axes": {"params": {"range": [3, 4]}}})
    assert _tasks(loaded).values(1) == {"params.range": 4}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("params.a=1", [1]),
        ("params.a=true,no,'x,y',[1,2]", [True, "no", "x,y", [1, 2]]),
        ("params.a=[[1,2],[3]]", [[1, 2], [3]]),
        ("params.a=1e-3, 2", [0.001, 2]),
    ],
)
def test_values_of_the_command_line_are_read_as_those_of_set_are(text: str, values: list[Any]) -> None:
    assert sweep_table([text]) == {"axes": {"params": {"a": values}}}


def test_the_command_line_wins_over_the_file_axis_by_axis(tmp_path: Path) -> None:
    in_file = {"sweep": {"axes": {"params.a": [1, 2], "params.b": [3]}, "max_parallel": 7}}
    loaded = _load(tmp_path, "params.a=9", **in_file)
    assert _values(loaded) == [(9, 3)]
    assert loaded.origins["job.sweep.max_parallel"].endswith("job.toml")
    assert _load(tmp_path, sets=("sweep.max_parallel=2",), **in_file).job.sweep.max_parallel == 2  # type: ignore[union-attr]


def test_what_a_task_lacks_without_its_axes_is_no_mistake(tmp_path: Path) -> None:
    loaded = _load(tmp_path, "params.lr=1,2", command=["train", "{params.lr}"])
    assert task_job(loaded.job, _tasks(loaded), 1).params == {"lr": 2}


def test_sweep_json_alone_tells_the_values(tmp_path: Path) -> None:
    axes = ("params.lr={uniform=[0, 1]}", "params.opt=[{ name = 'a' }]")
    tasks = _tasks(_load(tmp_path, *axes, sets=("sweep.mode=random", "sweep.samples=3")))
    path = tmp_path / "sweep.json"
    path.write_text(tasks.dump())
    again = Tasks.read(path)
    assert again == tasks
    assert [again.values(number) for number in range(3)] == [tasks.values(number) for number in range(3)]
    written = json.loads(path.read_text())
    assert (written["version"], written["tasks"], written["seed"], len(written["drawn"])) == (1, 3, 0, 3)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            again.values(number)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "axes": [{}]}'])
def test_a_sweep_json_that_is_no_such_file_is_told_in_a_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tasks.read(path)


@pytest.mark.parametrize(
    ("axes", "sets", "told"),
    [
        (["resources.nodes=1,2"], [], "--sweep: sweep.axes.resources.nodes: tasks of a sweep cannot differ in it"),
        (["name=a,b"], [], "--sweep: sweep.axes.name: tasks of a sweep cannot differ in it"),
        (["params.a=[]"], [], "--sweep: sweep.axes.params.a: has no values"),
        (["params.a=1,2", "params.b=1"], ["sweep.mode=zip"], "params.a has 2, params.b has 1; make them equal"),
        (["params.a={uniform=[0, 1]}"], [], "uniform is drawn at random"),
        (["params.a=1"], ["sweep.mode=random"], "sweep.samples: missing"),
        (["params.a=1"], ["sweep.samples=3"], "sweep.samples: a grid draws none (3)"),
        (["params.a={range=[0, 5, 0]}"], [], "range needs whole numbers"),
        (["params.a={range=[5, 0]}"], [], "range has 0 values"),
        (["params.a={range=[0, 1000000]}"], [], "range has 1000000 values"),
        (["params.a={range=[0, 1000]}", "params.b={range=[0, 1000]}"], [], "makes more than 100000 tasks"),
        (["params.a={log_uniform=[0, 1]}"], [], "log_uniform needs two numbers above 0"),
        (["params.a={integer=[1, 2.5]}"], [], "integer needs two whole numbers"),
        (["params.a={uniform=[2, 1]}"], [], "the lower one first"),
        (["params.a"], [], "--sweep: not KEY=V1,V2 (params.a); write for example params.lr=0.001,0.0001"),
        (["engine.zero_stage=1,7"], [], "--sweep: sweep.axes.engine.zero_stage: task 1: is none of the choices (7)"),
        (["checkpoint.keep_lst=1,2"], [], "task 0: unknown key (1); did you mean keep_last?"),
        (["params.a=1"], ["checkpoint.export_epochs=fp32"], "checkpoint.export_epochs: is not done for a sweep"),
        (["params.a=1"], ["sweep.max_parallel=0"], "sweep.max_parallel: must be at least 1"),
    ],
)
def test_axes_that_are_wrong_are_told_in_a_line(tmp_path: Path, axes: list[str], sets: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, *axes, sets=tuple(sets))
    assert told in str(caught.value.problems[0])


def test_a_mistake_that_every_task_makes_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, "params.a={range=[0, 500]}", command=["train", "{params.b}"])
    assert len(list(caught.value.problems)) == 1


def test_params_of_the_shipped_training_are_checked_for_each_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task 1: does not divide by heads = 3"):
        load("smoke_2rank", None, [], {}, sweep=sweep_table(["params.heads=2,3"]))
