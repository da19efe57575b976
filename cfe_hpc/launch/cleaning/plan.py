"""A plan of a clean-up: what was found, kept in a file until it is carried out or the world has changed."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cfe_hpc.caches import cache_folder
from cfe_hpc.errors import RunFailed, UsageError
from cfe_hpc.files import write_atomic
from cfe_hpc.launch.cleaning.choice import Choice, Criteria, Item
from cfe_hpc.launch.cleaning.trees import Tree

__all__ = ["CleaningPlan", "changes", "known_plans", "read_plan", "write_plan"]

_FORMAT = 1
_ID = re.compile(r"^gc-\d{8}-\d{6}-[0-9a-f]{4}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class CleaningPlan:
    """What a clean-up removes.

    Attributes:
        plan_id: its name, for `gc PLAN`.
        now_s: when the world was looked at: later on, nothing more has become old enough.
        roots: the runs roots that were looked at.
    """

    plan_id: str
    now_s: float
    criteria: Criteria
    roots: tuple[Path, ...]
    items: tuple[Item, ...]

    @property
    def size_bytes(self) -> int:
        return sum(item.tree.size_bytes for item in self.items)


def write_plan(criteria: Criteria, roots: Sequence[Path], choice: Choice, *, now_s: float) -> tuple[CleaningPlan, Path]:
    """Keep a plan; it, and its file, which only its owner can read.

    Raises:
        RunFailed: there is no folder that takes it.
    """
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    plan = CleaningPlan(
        plan_id=f"gc-{stamp}-{secrets.token_hex(2)}",
        now_s=now_s,
        criteria=criteria,
        roots=tuple(roots),
        items=tuple(choice.items),
    )
    path = _folder() / f"{plan.plan_id}.json"
    document = {"format": _FORMAT, **asdict(plan)}
    try:
        write_atomic(path, json.dumps(document, default=str, indent=1) + "\n", mode=0o600)
    except OSError as error:
        raise RunFailed(f"{path}: the plan cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error
    return plan, path


def _folder() -> Path:
    folder = cache_folder()
    if folder is None:
        raise RunFailed("there is no folder for the plan; set XDG_CACHE_HOME to one of your own that can be written")
    return folder


def known_plans() -> list[str]:
    """The plans that wait to be carried out, oldest first."""
    return sorted(path.stem for path in _folder().glob("gc-*.json") if _ID.match(path.stem))


def read_plan(ref: str) -> tuple[CleaningPlan, Path]:
    """The plan of an id, or of a file, and its file.

    Raises:
        UsageError: there is none, or it is none of this version's.
    """
    path = Path(ref) if os.sep in ref else _folder() / f"{ref}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = known_plans()
        hint = f"there are: {', '.join(known[-3:])}" if known else "make one with `cfe-hpc gc --plan`"
        raise UsageError(f"{ref}: no such plan, or it was carried out; {hint}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a plan ({error}); make a new one") from error
    try:
        return _restored(document), path
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: is no plan of this version; make a new one with `cfe-hpc gc --plan`") from error


def _restored(document: dict[str, Any]) -> CleaningPlan:
    if document.pop("format") != _FORMAT:
        raise KeyError("format")
    asked: dict[str, Any] = document["criteria"]
    criteria = Criteria(**{**asked, "states": tuple(asked["states"]), "kinds": tuple(asked["kinds"])})
    items = tuple(
        Item(**{**item, "path": Path(item["path"]), "tree": Tree(**item["tree"])}) for item in document["items"]
    )
    roots = tuple(map(Path, document["roots"]))
    return CleaningPlan(**{**document, "criteria": criteria, "roots": roots, "items": items})


def changes(plan: CleaningPlan, choice: Choice) -> list[str]:
    """What is no longer as planned, a sentence for each thing; none when the plan may be carried out.

    Args:
        choice: what the same criteria choose now, by the plan's own clock.
    """
    now = {item.path: item for item in choice.items}
    kept = {each.path: each.why for each in choice.kept}
    found = []
    for item in plan.items:
        today = now.get(item.path)
        if today is None and not os.path.lexists(item.path):
            found.append(f"{item.path}: is gone")
        elif today is None:
            found.append(f"{item.path}: must stay now{f': {kept[item.path]}' if item.path in kept else ''}")
        elif today.tree != item.tree:
            found.append(f"{item.path}: holds something else than it did")
    return found
