"""`{params.NAME}` in the command of a job: where parameters go on a command line, without a shell."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["fill_in", "missing_parameters"]

# Other braces stay as they are: commands carry shell, JSON and Python text.
_PLACEHOLDER = re.compile(r"\{params\.([A-Za-z_][\w.]*)\}")


def fill_in(word: str, params: Mapping[str, Any]) -> str:
    """`word` with each "{params.a.b}" replaced by that parameter: text as it stands, anything else as JSON.

    Raises:
        KeyError: no such parameter (a job that was loaded has none).
    """

    def value(match: re.Match[str]) -> str:
        found = _look_up(params, match[1])
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)

    return _PLACEHOLDER.sub(value, word)


def missing_parameters(word: str, params: Mapping[str, Any]) -> list[str]:
    """Names that `word` asks for and `params` does not have."""
    missing = []
    for name in _PLACEHOLDER.findall(word):
        try:
            _look_up(params, name)
        except KeyError:
            missing.append(name)
    return missing


def _look_up(params: Mapping[str, Any], name: str) -> Any:
    value: Any = params
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value
