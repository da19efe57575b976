"""The tasks of a sweep: how many there are, and which values each of them gets, by its number alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfe_hpc.errors import ConfigError, Problem

__all__ = ["Axis", "Tasks", "laid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis.

    Attributes:
        key: dotted, as a file has it.
        path: its parts.
        values: in order; empty where they are drawn.
        draw: the word and the two bounds that values are drawn by; None where there is a list of them.
    """

    key: str
    path: list[str]
    values: list[Any]
    draw: list[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """All that tells the tasks' values: what sweep.json holds.

    Attributes:
        tasks: how many there are; their numbers are 0 to tasks - 1, for ever.
        drawn: of a random sweep the values of each task, in the order of the axes.
    """

    mode: str
    tasks: int
    axes: list[Axis]
    seed: int | None = None
    drawn: list[list[Any]] | None = None
    max_parallel: int | None = None

    def values(self, number: int) -> dict[str, Any]:
        """Dotted key to value, of one task.

        Raises:
            IndexError: there is no such task.
        """
        return {axis.key: value for axis, value in zip(self.axes, self._row(number), strict=True)}

    def laid_on(self, table: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A job's table with the values of one task laid on, and no [sweep]."""
        job = {key: value for key, value in table.items() if key != "sweep"}
        for axis, value in zip(self.axes, self._row(number), strict=True):
            job = laid(job, axis.path, value)
        return job

    def _row(self, number: int) -> list[Any]:
        if not 0 <= number < self.tasks:
            raise IndexError(number)
        if self.drawn is not None:
            return self.drawn[number]
        if self.mode == "zip":
            return [axis.values[number] for axis in self.axes]
        row = []
        for axis in reversed(self.axes):
            number, index = divmod(number, len(axis.values))
            row.append(axis.values[index])
        return row[::-1]

    def dump(self) -> str:
        """The text of sweep.json."""
        return json.dumps({"version": 1, **asdict(self)}, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Tasks:
        """Read a sweep.json that `dump` made.

        Raises:
            ConfigError: it is missing, or something else.
        """
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            axes = [Axis(**axis) for axis in table.pop("axes")]
            table.pop("version")
            return cls(axes=axes, **table)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what, remedy = f"cannot be read: {error}", "it is written once, by submit: take it from a backup"
            raise ConfigError([Problem(file=str(path), key="", what=what, remedy=remedy)]) from error


def laid(table: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of `table` with the value at `path`; tables on the way are made or copied, others are shared."""
    name, *rest = path
    if not rest:
        return {**table, name: value}
    inner = table.get(name)
    return {**table, name: laid(inner if isinstance(inner, Mapping) else {}, rest, value)}
