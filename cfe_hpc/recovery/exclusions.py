"""Nodes that failed, and are avoided for a while by every run under the same runs root.

    <runs root>/.excluded-nodes/<node>.json     one exclusion

A broken node is often an idle one: left alone, it gets the next job, and the one after that. One file a node, written
whole: lines that several nodes append to one file over NFS overwrite each other.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cfe_hpc.files import write_atomic
from cfe_hpc.runfolder import RunFolder

__all__ = ["Exclusion", "choose", "exclude", "excluded", "exclusions_folder", "runs_root"]

# What goes to sbatch and into a file's name.
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """A node to avoid.

    Attributes:
        until_s: when it ends, in seconds since the epoch.
        cause: a word of recovery.causes.
        why: a sentence for people.
        run_id, attempt: where it failed.
    """

    node: str
    until_s: float
    cause: str
    why: str
    run_id: str
    attempt: int


def runs_root(folder: RunFolder) -> Path:
    """The folder of all runs that this run's folder lies in."""
    return folder.top.path.parents[1]


def exclusions_folder(root: Path) -> Path:
    """Where exclusions lie under a runs root; it need not be there."""
    return root / ".excluded-nodes"


def exclude(root: Path, exclusion: Exclusion) -> None:
    """Have a node avoided by all runs under `root`. What is said of it already is never cut short.

    Raises:
        OSError: it cannot be written.
        ValueError: this is no name of a node.
    """
    if not _NODE.fullmatch(exclusion.node):
        raise ValueError(f"no name of a node: {exclusion.node!r}")
    folder = exclusions_folder(root)
    folder.mkdir(exist_ok=True)
    path = folder / f"{exclusion.node}.json"
    before = _read(path)
    if before is not None:
        exclusion = replace(exclusion, until_s=max(exclusion.until_s, before.until_s))
    write_atomic(path, json.dumps(asdict(exclusion)) + "\n")


def excluded(root: Path, *, now_s: float) -> list[Exclusion]:
    """The exclusions in force, the newest first; expired ones are deleted. Files that say nothing are passed over."""
    found: list[Exclusion] = []
    for path in exclusions_folder(root).glob("*.json"):
        exclusion = _read(path)
        if exclusion is None:
            continue
        if exclusion.until_s > now_s:
            found.append(exclusion)
        else:
            with contextlib.suppress(OSError):  # another user's
                path.unlink(missing_ok=True)
    return sorted(found, key=lambda exclusion: (-exclusion.until_s, exclusion.node))


def _read(path: Path) -> Exclusion | None:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        exclusion = Exclusion(**{**facts, "until_s": float(facts["until_s"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return exclusion if exclusion.node == path.stem and _NODE.fullmatch(exclusion.node) else None


def choose(found: Sequence[Exclusion], *, nodes: int, nodes_max: int) -> tuple[list[str], list[str]]:
    """(nodes to avoid, nodes to take all the same so that the job can run at all).

    Args:
        found: of nodes that the job might get, the newest first: it is heeded first.
        nodes: that the job takes.
        nodes_max: that it might get, those of `found` among them.
    """
    names, most = [exclusion.node for exclusion in found], max(0, nodes_max - nodes)
    return names[:most], names[most:]
