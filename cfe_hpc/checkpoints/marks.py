"""Small files beside a checkpoint that say something of its step: `step-000000400.pinned`, `.epoch`, `.verified`.

They lie beside the folder, not in it: they outlive it when the step is saved again, and one look at the parent folder
finds all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.files import fsync_dir, write_atomic
from cfe_hpc.runfolder import utc_now

__all__ = ["KEEPING", "Mark", "holds", "parse", "put", "read", "remove"]

Mark = Literal["pinned", "epoch", "verified"]
"""pinned: a person wants it to stay; epoch: it ended one, and the job keeps those; verified: what `verify` found."""

KEEPING: tuple[Mark, ...] = ("pinned", "epoch")
"""Marks with which a checkpoint is never rotated or pruned."""

_NAME = re.compile(r"^(step-\d{9,})\.(pinned|epoch|verified)$")


def parse(name: str) -> tuple[str, str] | None:
    """(folder's name, mark) of a mark's file name; None of any other."""
    match = _NAME.match(name)
    return (match.group(1), match.group(2)) if match else None


def put(folder: Path, mark: Mark, **facts: Any) -> None:
    """Mark a checkpoint, in place of such a mark that is there; durable on return.

    Args:
        folder: the checkpoint's committed name, whether it is there or not.
        facts: JSON.

    Raises:
        OSError: it is not marked.
    """
    write_atomic(_path(folder, mark), json.dumps({"time": utc_now(), **facts}) + "\n")


def read(folder: Path, mark: Mark) -> dict[str, Any] | None:
    """The facts of a mark, `time` among them; None without it. An unreadable one has none but still counts."""
    try:
        facts = json.loads(_path(folder, mark).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def holds(folder: Path) -> bool:
    """Whether a mark keeps the checkpoint, as the filesystem says now."""
    return any(os.path.lexists(_path(folder, mark)) for mark in KEEPING)


def remove(folder: Path, mark: Mark) -> bool:
    """Take a mark off, durably; whether it was there. Raises OSError when it cannot be taken off."""
    with contextlib.suppress(FileNotFoundError):
        _path(folder, mark).unlink()
        fsync_dir(folder.parent)
        return True
    return False


def _path(folder: Path, mark: Mark) -> Path:
    return folder.with_name(f"{folder.name}.{mark}")
