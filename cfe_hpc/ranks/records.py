"""What `scontrol show … -o` prints: a record a line, each a list of NAME=VALUE."""

from __future__ import annotations

__all__ = ["record"]


def record(shown: str) -> dict[str, str]:
    """Name to value. The first of a name counts: paths, remarks and reasons, which may hold anything, come last."""
    return dict(word.split("=", 1) for word in reversed(shown.split()) if "=" in word)
