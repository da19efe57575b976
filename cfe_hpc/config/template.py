"""`{params.NAME}` in the command of a job: where parameters go on a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["command_argv", "has_parameter", "references"]

# Other braces stay as they are: commands carry shell, JSON and Python text.
_REFERENCE = re.compile(r"\{params\.([^{}\s]+)\}")


def references(word: str) -> list[str]:
    """Names of the parameters that one word of a command asks for, dots and all: "model.dim"."""
    return _REFERENCE.findall(word)


def command_argv(command: Sequence[str], params: Mapping[str, Any]) -> list[str]:
    """The command with every `{params.NAME}` replaced by the parameter; nothing goes through a shell.

    Text is put in as it is, numbers in their shortest exact form, true and false in lower case, lists and
    tables as JSON. What is put in is not looked at again.

    Raises:
        KeyError: a parameter that does not exist (a checked job has none).
    """
    return [_REFERENCE.sub(lambda match: _word(_look_up(params, match[1])), word) for word in command]


def _look_up(params: Mapping[str, Any], name: str) -> Any:
    if name in params:
        return params[name]
    value: Any = params
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value


def has_parameter(params: Mapping[str, Any], name: str) -> bool:
    """Whether `{params.<name>}` would be replaced."""
    try:
        _look_up(params, name)
    except KeyError:
        return False
    return True


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
