"""What must hold for a sweep: its axes, and every job that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from cfe_hpc.config.axes import tasks_of
from cfe_hpc.config.job import Job
from cfe_hpc.config.layers import dotted
from cfe_hpc.config.problems import toml_value, translate
from cfe_hpc.config.rules import job_problems
from cfe_hpc.config.sweep import Sweep
from cfe_hpc.config.tasks import Tasks
from cfe_hpc.errors import ConfigError, Problem

__all__ = ["parse_axis", "read_tasks", "sweep_problems", "task_job"]

Path = tuple[str | int, ...]
Origin = Callable[[Path], str]
ParamsCheck = Callable[[Mapping[str, Any]], None]

_TOLD = 20
"""Problems of tasks that are told: a mistake on one axis is made by very many tasks."""


def read_tasks(sweep: Sweep) -> Tasks:
    """The tasks of a sweep that `load` has found good."""
    tasks, _ = tasks_of(sweep, lambda *words, **more: Problem(file="", key="", what="", remedy=""))
    assert tasks is not None
    return tasks


def task_job(job: Job, tasks: Tasks, number: int) -> Job:
    """The job of one task.

    Args:
        job: the sweep's.

    Raises:
        pydantic.ValidationError: its values do not go together, which `load` has found already.
    """
    table = job.model_dump(mode="python", by_alias=True, exclude_none=True)
    return Job.model_validate(tasks.laid_on(table, number), by_alias=True, by_name=False)


def sweep_problems(job: Job, tree: Mapping[str, Any], origin: Origin, check_params: ParamsCheck) -> Iterator[Problem]:
    """Rules of a job that is a sweep: in place of `job_problems`, which it asks for the job of every task.

    Args:
        tree: the job as written: layers laid over one another.
        check_params: raises ConfigError for a task's [params] that its entry does not take.
    """
    assert job.sweep is not None

    def report(path: Path, what: str, remedy: str, value: Any = None) -> Problem:
        shown = None if value is None else toml_value(value)
        return Problem(file=origin(path), key=dotted(path), what=what, value=shown, remedy=remedy, check="sweep")

    tasks, problems = tasks_of(job.sweep, report)
    if tasks is None:
        yield from problems
        return
    if job.checkpoint.export_epochs is not None:
        remedy = "leave it out, and give `cfe-hpc checkpoints export TASK --epochs` for the tasks that are worth it"
        yield report(("checkpoint", "export_epochs"), "is not done for a sweep", remedy, job.checkpoint.export_epochs)
    seen: set[tuple[str, str]] = set()
    for number in range(tasks.tasks):
        for problem in _task_problems(tasks.laid_on(tree, number), origin, check_params):
            if (problem.key, str(problem)) not in seen and len(seen) < _TOLD:
                yield _of_task(problem, number, tasks, origin)
            seen.add((problem.key, str(problem)))


def _task_problems(table: Mapping[str, Any], origin: Origin, check_params: ParamsCheck) -> Iterator[Problem]:
    try:
        job = Job.model_validate(table, by_alias=True, by_name=False)
    except ValidationError as error:
        yield from (problem for _, problem in translate(error.errors(include_url=False), Job, origin))
        return
    yield from job_problems(job, origin)
    try:
        check_params(job.params)
    except ConfigError as error:
        yield from error.problems


def _of_task(problem: Problem, number: int, tasks: Tasks, origin: Origin) -> Problem:
    """The problem of a task, told of the axis that it comes from where one is in sight."""
    axis = next((axis for axis in tasks.axes if problem.key.startswith(axis.key)), None)
    path: Path = () if axis is None else ("sweep", "axes", *axis.path)
    return Problem(
        file=origin(path) if path else problem.file,
        key=dotted(path) if path else problem.key,
        what=f"task {number}: {problem.what}",
        value=problem.value,
        remedy=problem.remedy,
        check=problem.check,
    )


def parse_axis(text: str, read: Callable[[str], Any]) -> tuple[list[str], Any] | None:
    """`KEY=V1,V2` as (path of KEY, its values, or the table that makes them); None when it is nothing like it.

    Args:
        read: a value from its text.
    """
    key, equals, raw = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path) or not raw.strip():
        return None
    whole = read(raw.strip())
    if isinstance(whole, (Mapping, list)):
        return path, whole
    return path, [read(part) for part in _split(raw)]


def _split(raw: str) -> list[str]:
    """Parts between commas, but those within quotes and brackets."""
    parts, part, depth, quote = [], "", 0, ""
    for char in raw:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "[{") - (char in "]}")
        if char == "," and not quote and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()]
