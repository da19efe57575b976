"""Copies of checkpoints on the nodes' own disks: names, room, what is there, what may go. No torch.

    <node_local>/cfe_hpc-<uid>/<run id>/
        step-000000400.0-9f31c07a/     step, attempt and token of one save
            shard-00000.bin, .json     of this node's ranks, and of ranks of the node it is partner of
            manifest.json              the save's, of all ranks: written last
            durable                    empty: the shared filesystem has this checkpoint

Files are those of docs/checkpoint-format.md. A folder holds some of a checkpoint's shards; the checkpoint is complete
when the folders of its name on all nodes have all shards, and one of them the manifest.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.manifest import MANIFEST, Identity, Manifest, data_name, index_name
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint
from cfe_hpc.units import format_size

__all__ = [
    "Held",
    "check_name",
    "check_room",
    "copy_name",
    "evict",
    "expand_home",
    "has_shard",
    "held",
    "make_home",
    "mark_durable",
    "sweep_others",
]

_log = logging.getLogger(__name__)
_COPY = re.compile(r"^step-(\d{9,})\.(\d+)-([0-9a-f]+)$")
_DATA = re.compile(r"^shard-(\d{5,})\.bin$")
_DURABLE = "durable"
_MARGIN_BYTES = 1 << 20
_ABANDONED_S = 7 * 86_400.0
"""Other runs' folders that nobody has touched for so long belong to runs that have moved on or ended badly."""


def expand_home(node_local: str, run_id: str, environ: Mapping[str, str]) -> Path:
    """Where this node keeps its copies of the run's checkpoints.

    The user's id is in the name: on a folder that all users write to, such as /tmp, each needs one of their own.

    Args:
        node_local: the site's; $VARIABLES are expanded with this process's environment.

    Raises:
        CheckpointError: it names a variable that is not set here, or is no absolute path.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environ:
            raise CheckpointError(f"storage.node_local: {node_local}: variable {name} is not set on this node")
        return environ[name]

    base = Path(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, node_local))
    if not base.is_absolute():
        raise CheckpointError(f"storage.node_local: {node_local}: no absolute path on this node ({base})")
    return base / f"cfe_hpc-{os.geteuid()}" / run_id


def make_home(home: Path) -> None:
    """Make the folder, for this user alone.

    Raises:
        CheckpointError: somebody else made the folder above it: what lies there is not ours to trust.
        OSError: it cannot be made.
    """
    home.parent.parent.mkdir(parents=True, exist_ok=True)
    home.parent.mkdir(mode=0o700, exist_ok=True)
    found = home.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise CheckpointError(f"{home.parent} is not a folder that this user alone may write to")
    home.mkdir(mode=0o700, exist_ok=True)


def copy_name(identity: Identity) -> str:
    """The folder of a save; no two saves share one."""
    return f"{folders.step_name(identity.step)}.{identity.attempt}-{identity.token}"


def check_name(name: str, rank: int) -> None:
    """Raises CheckpointError for what is no folder of a save, or no rank: it came over the network."""
    if not _COPY.match(name) or not 0 <= rank < 10**9:
        raise CheckpointError(f"no shard of a checkpoint: {name[:80]!r}, rank {rank}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one node holds of one save.

    Attributes:
        shards: ranks whose data and index files are here; whether their bytes are whole is another matter.
        manifest: None when it is not here, or not as it was written.
        durable: the shared filesystem has the checkpoint, or had it.
    """

    folder: Path
    step: int
    attempt: int
    shards: tuple[int, ...]
    manifest: Manifest | None
    durable: bool


def held(home: Path) -> list[Held]:
    """What this node holds of the run's checkpoints, the newest save first. A missing home is empty."""
    found = []
    for entry in _entries(home):
        match = _COPY.match(entry.name)
        if match:
            found.append(_look(home / entry.name, int(match[1]), int(match[2]), match[3]))
    return sorted(found, key=lambda each: (each.attempt, each.step), reverse=True)


def _look(folder: Path, step: int, attempt: int, token: str) -> Held:
    names = {entry.name for entry in _entries(folder)}
    ranks = sorted(int(match[1]) for name in names if (match := _DATA.match(name)))
    return Held(
        folder=folder,
        step=step,
        attempt=attempt,
        shards=tuple(rank for rank in ranks if index_name(rank) in names and data_name(rank) in names),
        manifest=_manifest(folder, step, attempt, token),
        durable=_DURABLE in names,
    )


def _manifest(folder: Path, step: int, attempt: int, token: str) -> Manifest | None:
    try:
        manifest = Manifest.unseal((folder / MANIFEST).read_bytes())
    except (OSError, CorruptCheckpoint):
        return None
    identity = manifest.identity
    return manifest if (identity.step, identity.attempt, identity.token) == (step, attempt, token) else None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def has_shard(folder: Path, rank: int) -> bool:
    """Whether a save's folder has a rank's data file; whether its bytes are whole is another matter."""
    return (folder / data_name(rank)).is_file()


def check_room(home: Path, name: str, needed_bytes: int, limit_bytes: int | None) -> None:
    """Whether a save of `needed_bytes`, over all shards that come to this node, fits.

    Ranks of a node ask one after the other, each for the sum of all: what is there of this save already counts as
    room.

    Args:
        name: the save's folder.
        limit_bytes: the most that this run may take here; None for what the filesystem has.

    Raises:
        CheckpointError: it does not fit.
        OSError: the filesystem does not say.
    """
    space = os.statvfs(home)
    written_bytes = _size_bytes(home / name)
    free_bytes = space.f_bavail * space.f_frsize + written_bytes
    if needed_bytes + _MARGIN_BYTES > free_bytes:
        raise CheckpointError(
            f"{home}: the copy takes {format_size(needed_bytes)} and {format_size(free_bytes)} are free"
        )
    if limit_bytes is None:
        return
    others_bytes = sum(_size_bytes(home / entry.name) for entry in _entries(home)) - written_bytes
    if others_bytes + needed_bytes > limit_bytes:
        raise CheckpointError(
            f"{home}: the copy takes {format_size(needed_bytes)} beside {format_size(others_bytes)}, and "
            f"checkpoint.local_size allows {format_size(limit_bytes)}"
        )


def _size_bytes(folder: Path) -> int:
    total = 0
    for entry in _entries(folder):
        try:
            total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:  # another rank deletes or renames it
            continue
    return total


def mark_durable(folder: Path) -> None:
    """Note that the shared filesystem has the checkpoint: this copy is there to be read from, nothing more.

    Raises:
        OSError: it cannot be noted.
    """
    (folder / _DURABLE).touch()


def evict(home: Path, keep_last: int, attempt: int) -> list[int]:
    """Delete copies that nobody needs any more; failures are logged. One process of a node calls it.

    There stay the newest `keep_last` of those that are durable, and of this attempt's what is newer than all of
    these: it may be written at this moment.

    Returns:
        Steps of the deleted copies.
    """
    folders.sweep_trash(home)
    copies = held(home)
    durable = [copy for copy in copies if copy.durable]
    stays = {copy.folder for copy in durable[:keep_last]}
    for copy in copies:
        if copy.durable or copy.attempt != attempt:
            break
        stays.add(copy.folder)
    return [copy.step for copy in copies if copy.folder not in stays and folders.discard(copy.folder)]


def sweep_others(home: Path) -> None:
    """Delete what this user's other runs left on this node long ago. Failures are logged."""
    for entry in _entries(home.parent):
        try:
            newest_s = max(each.stat(follow_symlinks=False).st_mtime for each in [entry, *_entries(Path(entry.path))])
        except OSError:  # it is being deleted by another of this user's runs
            continue
        if entry.name != home.name and time.time() - newest_s > _ABANDONED_S and entry.is_dir(follow_symlinks=False):
            folders.discard(Path(entry.path))
