"""Which things may go, by age, state and size, and why others that look like it stay."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfe_hpc.checkpoints import folders as names
from cfe_hpc.checkpoints import marks
from cfe_hpc.checkpoints.keeping.rotation import Retention, inventory, reasons
from cfe_hpc.errors import ConfigError
from cfe_hpc.files import read_toml
from cfe_hpc.launch.cleaning.kinds import KINDS, Kind
from cfe_hpc.launch.cleaning.survey import Seen, State, parts_of
from cfe_hpc.launch.cleaning.trees import Tree, measure
from cfe_hpc.launch.snapshot import MARK, SNAPSHOTS, strays
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import format_duration

__all__ = ["TRASH", "Choice", "Criteria", "Item", "Kept", "choose", "grouped"]

TRASH = ".trash-"
"""Begins the name of whatever is being deleted. No run has such a name."""

_IN_USE_S = 86_400.0
"""A snapshot that was submitted with so lately may belong to a run that is just coming to be."""

_SNAPSHOT = re.compile(r'^snapshot = "(.*)"$', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """What is asked for.

    Attributes:
        older_s: least age: time since the last sign of life.
        states: how a run must have ended.
        larger_bytes: least size of each thing.
        keep_last: newest runs of each job that stay; of checkpoints, newest of each run, at least one.
        kinds: of things.
    """

    older_s: float
    states: tuple[State, ...]
    larger_bytes: int = 0
    keep_last: int = 0
    kinds: tuple[Kind, ...] = ("runs", "snapshots", "trash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A thing that may go.

    Attributes:
        run_id: of the run that it belongs to; None for what belongs to none.
        tree: what it holds, so that a change is noticed.
        why: it may go.
    """

    kind: Kind
    path: Path
    run_id: str | None
    tree: Tree
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A run that is old enough to go, and stays."""

    path: Path
    run_id: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What may go, and what stays although it looks like it."""

    items: list[Item] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


def choose(
    criteria: Criteria,
    seen: Sequence[Seen],
    roots: Sequence[Path],
    *,
    now_s: float,
    told: Callable[[int], None] = lambda count: None,
) -> Choice:
    """What may go of these runs, and of what else lies under the roots.

    Args:
        seen: every run under the roots.
        told: called with 1 for each run that has been looked at.
    """
    choice = Choice()
    needed = {run_id: each.folder.run_id for each in seen for run_id in each.needs}
    stays = _protected(criteria, seen, needed)
    for each in seen:
        told(1)
        if not _fits(each, criteria, now_s):
            continue
        why = f"{each.state}, {_ago(now_s - each.since_s)}"
        reason = stays.get(each.folder.path)
        if "runs" in criteria.kinds and reason is None:
            choice.items.extend(_large(criteria, [_item("runs", each.folder.path, each.folder.run_id, why)]))
            continue
        if "runs" in criteria.kinds and reason is not None:
            choice.kept.append(Kept(path=each.folder.path, run_id=each.folder.run_id, why=reason))
        # Whoever needs a run may need any of its checkpoints.
        if _is_mine(each.folder.path) and each.folder.run_id not in needed:
            for part in parts_of(each.folder):
                choice.items.extend(_large(criteria, _parts(part, criteria, why)))
    gone = {item.path for item in choice.items if item.kind == "runs"}
    remaining = [each.folder for each in seen if each.folder.path not in gone]
    for root in roots:
        if "snapshots" in criteria.kinds:
            choice.items.extend(_large(criteria, _snapshots(root, remaining, criteria, now_s)))
        if "trash" in criteria.kinds:
            choice.items.extend(_trash(root))
    return choice


def _ago(age_s: float) -> str:
    """An age for people, in whole days or hours."""
    unit_s = 86_400 if age_s >= 2 * 86_400 else 3_600
    return f"{format_duration(age_s // unit_s * unit_s)} ago" if age_s >= unit_s else "less than an hour ago"


def _fits(each: Seen, criteria: Criteria, now_s: float) -> bool:
    return each.state in criteria.states and now_s - each.since_s >= criteria.older_s


def _protected(criteria: Criteria, seen: Sequence[Seen], needed: Mapping[str, str]) -> dict[Path, str]:
    """Why runs stay whatever was asked for, by folder.

    Args:
        needed: run ids, and a run that needs each.
    """
    newest: dict[Path, list[Seen]] = {}
    for each in sorted(seen, key=lambda each: each.folder.run_id[-20:], reverse=True):
        newest.setdefault(each.folder.path.parent, []).append(each)
    last = {each.folder.path for runs in newest.values() for each in runs[: criteria.keep_last]}
    found = {}
    for each in seen:
        path, run_id = each.folder.path, each.folder.run_id
        pinned = None if each.state is None else _pinned(each.folder)
        if each.state is None:
            found[path] = each.why
        elif not _is_mine(path):
            found[path] = "belongs to another user"
        elif run_id in needed:
            found[path] = f"{needed[run_id]} needs it"
        elif pinned is not None:
            found[path] = f"{pinned} is pinned"
        elif path in last:
            found[path] = "is among the newest of its job"
    return found


def _is_mine(path: Path) -> bool:
    try:
        return os.lstat(path).st_uid == os.geteuid() and not path.is_symlink()
    except OSError:
        return False


def _pinned(folder: RunFolder) -> str | None:
    """The name of a checkpoint that a person has pinned, in the run or one of its tasks."""
    for part in parts_of(folder):
        for _, path in names.committed(part.checkpoints):
            if marks.read(path, "pinned") is not None:
                return path.name
    return None


def _item(kind: Kind, path: Path, run_id: str | None, why: str) -> Item:
    return Item(kind=kind, path=path, run_id=run_id, tree=measure(path), why=why)


def _large(criteria: Criteria, items: Iterator[Item] | Sequence[Item]) -> Iterator[Item]:
    return (item for item in items if item.tree.size_bytes >= criteria.larger_bytes)


def _parts(folder: RunFolder, criteria: Criteria, why: str) -> Iterator[Item]:
    """What may go of a run that itself stays."""
    if "checkpoints" in criteria.kinds:
        policy = Retention(keep_last=max(1, criteria.keep_last), keep_best=_keep_best(folder))
        checkpoints = inventory(folder.checkpoints)
        kept = reasons(checkpoints, policy, {})
        for each in checkpoints:
            if not kept[each.step]:
                yield _item("checkpoints", each.path, folder.run_id, why)
    if "logs" in criteria.kinds and folder.logs.is_dir() and any(folder.logs.iterdir()):
        yield _item("logs", folder.logs, folder.run_id, why)


def _keep_best(folder: RunFolder) -> str | None:
    try:
        rule = read_toml(folder.run_toml).get("job", {}).get("checkpoint", {}).get("keep_best")
    except (ConfigError, AttributeError):
        return None
    return rule if isinstance(rule, str) else None


def _snapshots(root: Path, runs: Sequence[RunFolder], criteria: Criteria, now_s: float) -> Iterator[Item]:
    """Snapshots that none of these runs has, that nobody has submitted with for a while, and that hold nothing that a
    program has written there."""
    found = {path: age_s for path in _folders(root / SNAPSHOTS) if (age_s := now_s - _used_s(path)) >= _IN_USE_S}
    used = {name for folder in runs if found for name in _snapshots_of(folder)}
    for path, age_s in found.items():
        if age_s >= criteria.older_s and path.name not in used and _is_mine(path) and not any(strays(path)):
            yield _item("snapshots", path, None, f"no run has it, last used {_ago(age_s)}")


def _used_s(snapshot: Path) -> float:
    for path in (snapshot / MARK, snapshot):
        try:
            return os.stat(path).st_mtime
        except OSError:
            continue
    return float("inf")


def _snapshots_of(folder: RunFolder) -> Iterator[str]:
    for part in parts_of(folder):
        try:
            text = part.run_toml.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        yield from (Path(path).name for path in _SNAPSHOT.findall(text))


def _trash(root: Path) -> Iterator[Item]:
    """What clean-ups that were cut short have renamed, and not deleted."""
    for parent in [root, *_folders(root)]:
        for path in _folders(parent):
            if path.name.startswith(TRASH) and _is_mine(path):
                yield _item("trash", path, None, "left half deleted")


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def grouped(items: Sequence[Item]) -> Mapping[Kind, list[Item]]:
    """The items by kind, in the order of KINDS."""
    return {kind: found for kind in KINDS if (found := [item for item in items if item.kind == kind])}
