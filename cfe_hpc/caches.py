"""Answers that are kept for a while in the user's cache folder. Nothing there is needed: it may vanish at any time."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from cfe_hpc.files import written_aside

__all__ = ["cache_folder", "forget", "recall", "remember"]


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/cfe_hpc` (`~/.cache/cfe_hpc`), for its owner alone; None where there can be none."""
    home = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    try:
        folder = Path(home).expanduser() / "cfe_hpc"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = folder.stat().st_uid == os.geteuid()
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where ~ is
        return None
    return folder if mine else None


def recall(name: str, *, max_age_s: float) -> dict[str, Any] | None:
    """The document that was remembered under `name`; None when there is none, or it is older."""
    folder = cache_folder()
    if folder is None or max_age_s <= 0:
        return None
    try:
        with open(folder / name, encoding="utf-8") as stream:
            age_s = time.time() - os.fstat(stream.fileno()).st_mtime
            loaded = json.load(stream) if 0 <= age_s < max_age_s else None
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def remember(name: str, document: dict[str, Any]) -> None:
    """Keep a JSON document under `name`, readable to its owner alone; where that cannot be, nothing happens."""
    folder = cache_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        path = folder / name
        with written_aside(path, json.dumps(document), mode=0o600, synced=False) as aside:
            os.replace(aside, path)


def forget(name: str) -> None:
    """Remember nothing under `name` any more."""
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
