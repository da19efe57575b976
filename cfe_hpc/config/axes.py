"""From the axes of `[sweep]` to its tasks, or to what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cfe_hpc.config.layers import dotted
from cfe_hpc.config.problems import toml_value
from cfe_hpc.config.sweep import Sweep
from cfe_hpc.config.tasks import Axis, Tasks
from cfe_hpc.errors import Problem

__all__ = ["SWEPT", "TASKS_MAX", "tasks_of"]

SWEPT = ("params", "engine", "checkpoint", "recovery", "metrics")
"""Tables of a job that tasks may differ in. All else is one for the whole array: what it takes of the site, and what
it runs."""

TASKS_MAX = 100_000
"""More in one sweep are a mistake: folders have six digits, and no site takes as many."""

_DRAWN = ("uniform", "log_uniform", "integer")
_WORDS = ("range", *_DRAWN)

Keys = tuple[str, ...]
Report = Callable[..., Problem]


def tasks_of(sweep: Sweep, report: Report) -> tuple[Tasks | None, list[Problem]]:
    """The tasks of a sweep, or what is wrong with it.

    Args:
        report: as `config.rules` makes it: a problem from (path, what, remedy, value).
    """
    problems: list[Problem] = []
    given = dict(_leaves(sweep.axes, ()))
    axes = [axis for path, values in given.items() if (axis := _axis(path, values, report, problems))]
    if not problems:
        problems += _mode_problems(sweep, axes, report)
    if problems:
        return None, problems
    tasks = sweep.samples or 0
    if sweep.mode == "grid":
        tasks = math.prod(len(axis.values) for axis in axes)
    elif sweep.mode == "zip":
        tasks = len(axes[0].values)
    if tasks > TASKS_MAX:
        return None, [report(("sweep",), f"makes more than {TASKS_MAX} tasks", "take fewer values", tasks)]
    drawn = _draw(axes, tasks, sweep.seed) if sweep.mode == "random" else None
    seed = sweep.seed if drawn is not None else None
    made = Tasks(mode=sweep.mode, tasks=tasks, axes=axes, seed=seed, drawn=drawn, max_parallel=sweep.max_parallel)
    return made, []


def _leaves(table: Mapping[str, Any], path: Keys) -> Iterator[tuple[Keys, Any]]:
    """(path, what is given for it) of each axis: keys may be written dotted in quotes, or as tables in tables."""
    for key, given in table.items():
        here = (*path, *key.split(".")) if not path else (*path, key)
        word = next(iter(given), None) if isinstance(given, Mapping) and len(given) == 1 else None
        if isinstance(given, Mapping) and not (word in _WORDS and len(here) > 1):
            yield from _leaves(given, here)
        else:
            yield here, given


def _axis(path: Keys, given: Any, report: Report, problems: list[Problem]) -> Axis | None:
    at, known = ("sweep", "axes", *path), len(problems)
    if path[0] not in SWEPT or len(path) < 2:
        what = "tasks of a sweep cannot differ in it"
        remedy = f"they may in keys of {', '.join(SWEPT)}: the rest is one for the whole array"
        problems.append(report(at, what, remedy))
    if isinstance(given, list):
        if not given:
            problems.append(report(at, "has no values", "list them: [0.001, 0.0001]"))
        values, draw = given, None
    elif isinstance(given, Mapping):
        word, bounds = next(iter(given.items()))
        values, draw = _made(at, word, bounds, report, problems)
    else:
        values, draw = [], None
        problems.append(report(at, "must be a list of values", f"write [{toml_value(given)}], with more values", given))
    return Axis(key=dotted(path), path=list(path), values=values, draw=draw) if len(problems) == known else None


def _made(
    at: Keys, word: str, bounds: Any, report: Report, problems: list[Problem]
) -> tuple[list[Any], list[Any] | None]:
    """(values, how they are drawn) of an axis that is given by a word and numbers."""
    numbers = isinstance(bounds, list) and all(
        isinstance(bound, (int, float)) and not isinstance(bound, bool) and math.isfinite(bound) for bound in bounds
    )
    whole = numbers and all(isinstance(bound, int) for bound in bounds)
    if word == "range":
        if not whole or len(bounds) not in (2, 3) or bounds[2:] == [0]:
            remedy = "write { range = [0, 10] }, or with a step { range = [0, 100, 10] }; the end is not in it"
            problems.append(report(at, "range needs whole numbers: start, end and perhaps a step", remedy, bounds))
            return [], None
        made = range(*bounds)
        if not made or len(made) > TASKS_MAX:
            problems.append(report(at, f"range has {len(made)} values", f"between 1 and {TASKS_MAX} are taken", bounds))
        return list(made) if len(made) <= TASKS_MAX else [], None
    low_at_least = 0 if word == "log_uniform" else -math.inf
    good = numbers and len(bounds) == 2 and low_at_least <= bounds[0] < bounds[1]
    if not good or (word == "integer" and not whole) or (word == "log_uniform" and bounds[0] <= 0):
        kind = {"integer": "two whole numbers", "log_uniform": "two numbers above 0"}.get(word, "two numbers")
        remedy = f"write {{ {word} = [{'1, 8' if word == 'integer' else '0.0001, 0.1'}] }}"
        problems.append(report(at, f"{word} needs {kind}, the lower one first", remedy, bounds))
    return [], [word, *bounds] if good else None


def _mode_problems(sweep: Sweep, axes: list[Axis], report: Report) -> Iterator[Problem]:
    for axis in axes:
        if axis.draw is not None and sweep.mode != "random":
            remedy = 'list the values, or set sweep.mode = "random" and sweep.samples'
            yield report(("sweep", "axes", *axis.path), f"{axis.draw[0]} is drawn at random", remedy)
    if sweep.mode == "random" and sweep.samples is None:
        yield report(("sweep", "samples"), "missing", "say how many tasks to draw: samples = 20")
    if sweep.mode != "random" and sweep.samples is not None:
        remedy = 'leave it out, or set sweep.mode = "random"'
        yield report(("sweep", "samples"), f"a {sweep.mode} draws none", remedy, sweep.samples)
    lengths = {axis.key: len(axis.values) for axis in axes}
    if sweep.mode == "zip" and len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        yield report(("sweep", "axes"), f"zip needs as many values on each axis: {shown}", "make them equal")


def _draw(axes: list[Axis], tasks: int, seed: int) -> list[list[Any]]:
    """The values of each task. Written down, for another Python might draw others with the same seed."""
    from random import Random  # late: it loads OpenSSL

    source = Random(seed)
    return [[_one(axis, source) for axis in axes] for _ in range(tasks)]


def _one(axis: Axis, source: Any) -> Any:
    if axis.draw is None:
        return source.choice(axis.values)
    word, low, high = axis.draw
    if word == "integer":
        return source.randint(low, high)
    if word == "log_uniform":
        return math.exp(source.uniform(math.log(low), math.log(high)))
    return source.uniform(low, high)
