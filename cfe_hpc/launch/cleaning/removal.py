"""Carrying out a plan: each thing loses its name first, then its files, so that a reader never sees half of it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from cfe_hpc.checkpoints import folders as names
from cfe_hpc.checkpoints import marks
from cfe_hpc.launch.cleaning.choice import TRASH, Item
from cfe_hpc.launch.cleaning.trees import measure

__all__ = ["remove"]

logger = logging.getLogger(__name__)


def remove(item: Item, told: Callable[[int], None] = lambda size_bytes: None) -> str | None:
    """Remove a thing of a plan.

    Args:
        told: called with the bytes that were removed.

    Returns:
        None when it has lost its name: what cannot be deleted then is left to the next clean-up. Else why it stays.
    """
    if item.kind == "checkpoints":
        why = None if names.take_out(item.path) else "is pinned, or cannot be renamed"
        if why is None:
            with contextlib.suppress(OSError):
                marks.remove(item.path, "verified")
            names.sweep_trash(item.path.parent)
            told(item.tree.size_bytes)
        return why
    aside = item.path
    if item.kind != "trash":
        aside = item.path.with_name(f"{TRASH}{item.path.name}-{secrets.token_hex(4)}")
        why = _set_aside(item, aside)
        if why is not None:
            return why
    _delete(aside)
    told(item.tree.size_bytes)
    return None


def _set_aside(item: Item, aside: Path) -> str | None:
    """Rename it; why that was not done, or was taken back.

    Whoever requeues or pins a run in this very moment either finds it no more, or has changed it before the rename,
    which is seen after it.
    """
    try:
        os.rename(item.path, aside)
    except OSError as error:
        return f"cannot be renamed ({error.strerror})"
    if measure(aside) != item.tree:
        with contextlib.suppress(OSError):
            os.rename(aside, item.path)
        return "has just been changed"
    if item.kind == "logs":
        with contextlib.suppress(OSError):
            item.path.mkdir()
    return None


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s is deleted in part only: %s", folder, error.strerror)
