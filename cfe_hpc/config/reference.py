"""Prints the reference tables of docs/configuration.md from the models: `python -m cfe_hpc.config.reference FILE`
puts them into the file between its markers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cfe_hpc.config.base import spelt, unit_of
from cfe_hpc.config.environment import HONOURED, TRAIN_ENTRY
from cfe_hpc.config.job import Job
from cfe_hpc.config.load import PRECEDENCE
from cfe_hpc.config.problems import key_of, literal_words, nested_model, toml_value
from cfe_hpc.config.site import Site
from cfe_hpc.files import write_atomic

__all__ = ["BEGIN", "END", "main", "reference", "with_reference"]

BEGIN = "<!-- reference: written by `python -m cfe_hpc.config.reference docs/configuration.md` -->"
END = "<!-- end of reference -->"

_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", list: "list", dict: "table"}


def reference() -> str:
    """The tables of job files and site profiles, the layers and the variables, in Markdown."""
    lines = ["## Job files", *_tables(Job, ""), "", "## Site profiles", *_tables(Site, "")]
    lines += ["", f"## `[params]` of `{TRAIN_ENTRY}`", "", *_rows(import_module("cfe_hpc.train.config").Params)]
    lines += ["", "## Precedence", "", "Each layer wins over those before it.", ""]
    lines += [f"{number}. **{name}**: {meaning}" for number, (name, meaning) in enumerate(PRECEDENCE, start=1)]
    lines += ["", "## Environment variables", "", "An empty variable counts as unset.", ""]
    lines += ["| variable | sets |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in HONOURED.items()]
    return "\n".join(lines) + "\n"


def _tables(model: type[BaseModel], header: str) -> Iterator[str]:
    """A model's own keys as one table, then those of its tables."""
    inner = [(key_of(name, field), field) for name, field in model.model_fields.items() if _table_of(field)]
    yield ""
    yield f"### `[{header}]`" if header else "### At the top"
    yield ""
    if header:
        yield (model.__doc__ or "").partition(": ")[2].strip().capitalize()
        yield ""
    yield from _rows(model)
    for key, field in inner:
        nested = _table_of(field)
        assert nested is not None  # by the choice above
        name = f"{key}.NAME" if get_origin(field.annotation) is dict else key
        yield from _tables(nested, f"{header}.{name}" if header else name)


def _rows(model: type[BaseModel]) -> Iterator[str]:
    """The table of a model's plain keys."""
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        if _table_of(field):
            continue
        example = f", e.g. `{field.examples[0]}`" if field.examples and not _words(field) else ""
        cells = [f"`{key_of(name, field)}`", _kind(field) + example, _default(field), field.description or ""]
        yield f"| {' | '.join(map(_cell, cells))} |"


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    return nested_model(field.annotation)


def _words(field: FieldInfo) -> list[Any]:
    return literal_words(field.annotation)


def _kind(field: FieldInfo) -> str:
    words = _words(field)
    if words:
        return " or ".join(f"`{toml_value(word)}`" for word in words)
    unit = unit_of(field)
    if unit:
        return unit
    kinds = [field.annotation, *get_args(field.annotation)]
    return next(_KINDS[kind] for kind in (get_origin(kind) or kind for kind in kinds) if kind in _KINDS)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "empty"
    if field.default is PydanticUndefined:
        return "**required**"
    return "not set" if field.default is None else f"`{toml_value(spelt(field, field.default))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def with_reference(text: str) -> str:
    """`text` with what stands between its markers replaced by the reference of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


def main(argv: list[str]) -> int:
    """Bring the reference in each file named up to date."""
    for name in argv:
        path = Path(name)
        write_atomic(path, with_reference(path.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
