"""Why a run that was to follow others has not begun."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from cfe_hpc.files import tomllib
from cfe_hpc.runfolder import RunFolder

__all__ = ["in_vain", "unfinished", "upstream"]


def upstream(folder: RunFolder) -> list[RunFolder]:
    """The runs that must have completed before this one starts, as frozen at submission."""
    try:
        after = tomllib.loads(_head(folder.run_toml)).get("after", [])
    except (OSError, ValueError):  # told by whoever needs the run
        return []
    return [RunFolder(Path(path)) for path in after if isinstance(path, str)] if isinstance(after, list) else []


def _head(run_toml: Path) -> str:
    """What stands before the first table: the whole takes milliseconds to read, and `status` asks of every run that
    waits."""
    with open(run_toml, encoding="utf-8") as stream:
        return "".join(takewhile(lambda line: not line.startswith("["), stream))


def unfinished(folder: RunFolder) -> list[str]:
    """Ids of those that it still waits for."""
    return [each.run_id for each in upstream(folder) if (each.result() or {}).get("state") != "COMPLETED"]


def in_vain(folder: RunFolder) -> str | None:
    """A sentence about the run that ended badly, for which this one would wait for ever; None when there is none.

    A run that itself never started, because of one before it, is looked through.
    """
    culprit = next(_culprits(folder), None)
    if culprit is None:
        return None
    result = culprit.result() or {}
    why = str(result.get("reason") or "").splitlines()
    return f"never started: {culprit.run_id} ended {result.get('state')}{f': {why[0]}' if why else ''}"


def _culprits(folder: RunFolder) -> Iterator[RunFolder]:
    for each in upstream(folder):
        result = each.result()
        begun = any(event.get("event") == "started" for event in each.events())
        if not begun and each.promised("cancel") is None and (result is None or result.get("state") == "CANCELLED"):
            yield from _culprits(each)
        elif result is not None and result.get("state") != "COMPLETED":
            yield each
