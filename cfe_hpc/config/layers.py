"""Tables laid over one another, every value remembering which layer it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["Layers", "dotted", "quoted"]

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def quoted(text: str) -> str:
    """Text as TOML spells it, on one line."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def dotted(path: tuple[str | int, ...]) -> str:
    """A path as TOML writes it: `partitions.gpu.hardware`, `command[2]`, `params."a b"`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _BARE.fullmatch(part) else quoted(part)
            text += f".{name}" if text else name
    return text


class Layers:
    """A tree of tables. Later layers win value by value; tables merge, everything else is replaced whole."""

    def __init__(self, base_origin: str) -> None:
        """Args:
        base_origin: named for keys that no layer holds, such as a missing one.
        """
        self.tree: dict[str, Any] = {}
        self._base_origin = base_origin
        self._origins: dict[tuple[str, ...], str] = {}

    def lay(self, table: Mapping[str, Any], origin: str) -> None:
        """Lay `table` over what is there."""
        self._lay(self.tree, table, origin, ())

    def _lay(self, into: dict[str, Any], table: Mapping[str, Any], origin: str, path: tuple[str, ...]) -> None:
        for key, value in table.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                if not isinstance(into.get(key), dict):
                    self._forget(here)
                    into[key] = {}
                    self._origins[here] = origin
                self._lay(into[key], value, origin, here)
            else:
                self._forget(here)
                into[key] = value
                self._origins[here] = origin

    def _forget(self, path: tuple[str, ...]) -> None:
        for known in [known for known in self._origins if known[: len(path)] == path]:
            del self._origins[known]

    def origin(self, path: tuple[str | int, ...]) -> str:
        """The layer that a value, or the nearest table around it, came from."""
        names = tuple(part for part in path if isinstance(part, str))
        for length in range(len(names), 0, -1):
            if names[:length] in self._origins:
                return self._origins[names[:length]]
        return self._base_origin

    def origin_of_value(self, path: tuple[str, ...]) -> str | None:
        """The layer that set exactly this value; None when no layer did."""
        return self._origins.get(path)
