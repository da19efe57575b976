"""The name that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(wrong: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The one of `known` most like `wrong`, letter case and the order of its parts aside: max_nodes is nodes_max.

    Args:
        cutoff: likeness from 0 to 1 below which nothing is returned.
    """
    names = list(known)
    parts = sorted(re.split(r"[-_ .]", wrong.lower()))
    for name in names:
        if sorted(re.split(r"[-_ .]", name.lower())) == parts:
            return name
    from difflib import get_close_matches  # late: only mistakes need it, and every command starts through here

    lowered = {name.lower(): name for name in reversed(names)}
    near = get_close_matches(wrong.lower(), lowered, n=1, cutoff=cutoff)
    return lowered[near[0]] if near else None
