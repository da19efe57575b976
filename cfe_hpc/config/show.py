"""A job or site as TOML again, every key spelt out, with a remark on each line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from cfe_hpc.config.base import spelt
from cfe_hpc.config.layers import dotted
from cfe_hpc.config.problems import key_of, toml_value

__all__ = ["toml_lines"]

Remark = Callable[[str], str]
Path = tuple[str, ...]


def toml_lines(model: BaseModel, remark: Remark | None = None) -> Iterator[str]:
    """The lines of a file that reads back to `model`. Keys without a value are there as comments.

    Args:
        remark: dotted key to the comment that ends its line; no comments when None.
    """
    rows = list(_rows(model, (), remark))
    width = max((len(left) for left, right in rows if right), default=0)
    for left, right in rows:
        yield f"{left:<{width}}  # {right}" if right else left


def _rows(model: BaseModel, path: Path, remark: Remark | None) -> Iterator[tuple[str, str]]:
    """(line, comment) of a table: plain values first, since TOML ends a table where the next one begins."""
    tables: list[tuple[Path, Any]] = []
    for name, field in type(model).model_fields.items():
        value, here = getattr(model, name), (*path, key_of(name, field))
        if isinstance(value, (BaseModel, Mapping)):
            tables.append((here, value))
            continue
        shown = toml_value(spelt(field, value))
        line = f"# {here[-1]} is not set" if value is None else f"{here[-1]} = {shown}"
        yield line, remark(dotted(here)) if remark else ""
    for here, table in tables:
        yield from _table(here, table, remark)


def _table(path: Path, table: Any, remark: Remark | None) -> Iterator[tuple[str, str]]:
    if isinstance(table, Mapping) and table and all(isinstance(value, BaseModel) for value in table.values()):
        for name, value in table.items():
            yield from _table((*path, name), value, remark)
        return
    yield "", ""
    yield f"[{dotted(path)}]", ""
    if isinstance(table, BaseModel):
        yield from _rows(table, path, remark)
        return
    for key, value in table.items():
        where = dotted((*path, key))
        yield f"{dotted((key,))} = {toml_value(value)}", _remark_within(value, where, remark) if remark else ""


def _remark_within(value: Any, key: str, remark: Remark) -> str:
    """The remark of a value of a free table; of every value inside when it is a table itself."""
    if not isinstance(value, Mapping) or not value:
        return remark(key)
    inner = {name: _remark_within(item, f"{key}.{dotted((name,))}", remark) for name, item in value.items()}
    if len(set(inner.values())) == 1:
        return next(iter(inner.values()))
    return ", ".join(f"{name}: {text}" for name, text in inner.items())
