"""Pydantic's findings, in the words of the person who wrote the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cfe_hpc.config.layers import dotted, quoted
from cfe_hpc.config.nearest import nearest
from cfe_hpc.errors import Problem
from cfe_hpc.units import parse_duration_s

__all__ = ["field_at", "key_of", "nested_model", "toml_value", "translate"]

Path = tuple[int | str, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_LONG_UNITS = {"weeks?": "w", "days?": "d", "hours?|hrs?": "h", "minutes?|mins?": "m", "seconds?|secs?": "s"}


def key_of(name: str, field: FieldInfo) -> str:
    """A field's name in the file."""
    return field.alias or name


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model of a table, be it optional, or of each table in a table of tables; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is dict:
        return nested_model(get_args(annotation)[1])
    if get_origin(annotation) is UnionType:
        return next(filter(None, map(nested_model, get_args(annotation))), None)
    return None


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {key_of(name, field): field for name, field in model.model_fields.items()}


def field_at(model: type[BaseModel], path: Path) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The innermost model that `path` reaches and the field of it that its end names, as far as they exist."""
    here = model
    field: FieldInfo | None = None
    expects_name = True
    for position, part in enumerate(path, start=1):
        if not expects_name:  # the NAME of [partitions.NAME]: any will do
            expects_name, field = True, None
            continue
        field = _fields(here).get(str(part))
        if field is None:
            return here, None
        inner = nested_model(field.annotation)
        if inner is not None:
            expects_name = get_origin(field.annotation) is not dict
            here = inner
        elif position < len(path):  # inside a free table or a list: no field of its own
            return None, None
    return here, field


def toml_value(value: Any) -> str:
    """A plain value as TOML spells it, for messages."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dotted((str(key),))} = {toml_value(item)}" for key, item in value.items()) + "}"
    return str(value)


def translate(
    errors: Iterable[ErrorDetails], model: type[BaseModel], origin: Callable[[Path], str]
) -> list[tuple[Path, Problem]]:
    """One problem for each of pydantic's findings, with the path it is about.

    Args:
        errors: `ValidationError.errors()`.
        origin: the layer, as messages name it, that the value at a path came from.
    """
    problems = []
    for error in errors:
        path: Path = tuple(part for part in error["loc"] if part != "[key]")
        what, value, remedy = _explain(error, model, path)
        problem = Problem(file=origin(path), key=dotted(path), what=what, value=value, remedy=remedy)
        problems.append((path, problem))
    return problems


def _explain(error: ErrorDetails, model: type[BaseModel], path: Path) -> tuple[str, Any, str]:
    """What is wrong, the value to show, and the remedy."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    _, field = field_at(model, path)
    example = _example(field, path)
    if kind == "extra_forbidden":
        return "unknown key", None if isinstance(value, dict) else toml_value(value), _nearest_key(model, path)
    if kind == "missing":
        return "missing", None, example
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}", toml_value(value), _respelt(value, kind, path) or example
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}", toml_value(value), example
    if kind == "literal_error":
        return "is none of the choices", toml_value(value), _nearest_word(str(value), field)
    if kind == "value_error":
        what, _, hint = str(context["error"]).partition(": ")
        suggestion = _short_units(value)
        return what, toml_value(value), f'write "{suggestion}"' if suggestion else (hint or example)
    if kind in ("too_short", "string_too_short"):
        return "is empty", None, example
    if kind == "string_too_long":
        return f"is longer than {context['max_length']} characters", value, "choose a shorter one"
    return "not of the form expected", toml_value(value), example


def _example(field: FieldInfo | None, path: Path) -> str:
    name = next((part for part in reversed(path) if isinstance(part, str)), "")
    if field is not None and field.examples:
        return f"write for example {dotted((name,))} = {field.examples[0]}"
    if field is None or nested_model(field.annotation) is None:
        return "write it so"  # inside a free table or a list of text: the kind of value has been named already
    return f"give it its own [{name}.NAME]" if get_origin(field.annotation) is dict else f"give it its own [{name}]"


def _respelt(value: Any, kind: str, path: Path) -> str | None:
    """The remedy when only the quotes are wrong: a number or a truth that has them, text that has none."""
    key = dotted(path[-1:]) if isinstance(path[-1], str) else "it as"
    if kind == "string_type" and not isinstance(value, (list, dict)):
        return f'write {key} "{toml_value(value)}"' if key == "it as" else f'write {key} = "{toml_value(value)}"'
    patterns = {"int_type": r"[+-]?\d+", "float_type": r"[+-]?\d+(\.\d+)?", "bool_type": r"(?i:true|false)"}
    if isinstance(value, str) and kind in patterns and re.fullmatch(patterns[kind], value.strip()):
        return f"write {key} = {value.strip().lower()}, without quotes"
    return None


def _nearest_key(model: type[BaseModel], path: Path) -> str:
    table, _ = field_at(model, path[:-1])
    assert table is not None  # pydantic found the key in a table that it knows
    valid, wrong = list(_fields(table)), str(path[-1])
    near = nearest(wrong, valid)
    if near:
        return f"did you mean {near}? valid here: {', '.join(valid)}"
    for elsewhere in _tables_with(model, wrong):
        return f"did you mean {elsewhere}.{wrong}? valid here: {', '.join(valid)}"
    return f"valid here: {', '.join(valid)}"


def _tables_with(model: type[BaseModel], key: str) -> list[str]:
    """Tables of the file, one level down, that have such a key."""
    found = []
    for name, field in _fields(model).items():
        inner = nested_model(field.annotation)
        if inner is not None and get_origin(field.annotation) is not dict and key in _fields(inner):
            found.append(name)
    return found


def literal_words(annotation: Any) -> list[Any]:
    """The values of a Literal, wherever it stands in an annotation."""
    arguments = get_args(annotation)
    if arguments and all(isinstance(argument, (str, int)) for argument in arguments):
        return list(arguments)
    return [word for argument in arguments for word in literal_words(argument)]


def _nearest_word(value: str, field: FieldInfo | None) -> str:
    words = literal_words(field.annotation) if field is not None else []
    near = nearest(value, [word for word in words if isinstance(word, str)])
    hint = f'did you mean "{near}"? ' if near else ""
    return f"{hint}choose from {', '.join(toml_value(word) for word in words)}"


def _short_units(value: Any) -> str | None:
    """ "4h" for "4 hours"; None when that is not what is wrong."""
    if not isinstance(value, str):
        return None
    short = value.lower().replace(",", " ").replace(" and ", " ")
    for long, unit in _LONG_UNITS.items():
        short = re.sub(rf"(\d)\s*(?:{long})\b\s*", rf"\g<1>{unit}", short)
    try:
        parse_duration_s(short)
    except ValueError:
        return None
    return short
