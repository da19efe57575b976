"""Names and renames in the checkpoints folder: what is committed, a draft, or on its way out.

    step-000000400                    committed, when its manifest verifies
    step-000000400.tmp-<attempt>-<8 hex>   a draft; complete when its manifest is there
    .trash-step-000000400-<8 hex>     being deleted

Nothing here reads or writes what the folders hold, but for the manifest's name.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
from pathlib import Path

from cfe_hpc.checkpoints.manifest import MANIFEST, Manifest
from cfe_hpc.errors import CorruptCheckpoint
from cfe_hpc.files import fsync_dir

__all__ = ["committed", "discard", "draft_name", "put_in_place", "settle", "step_name", "sweep_drafts", "sweep_trash"]

_log = logging.getLogger(__name__)
_STEP = re.compile(r"^step-(\d{9,})$")
_DRAFT = re.compile(r"^(step-\d{9,})\.tmp-(\d+)-[0-9a-f]+$")
_TRASH = ".trash-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def step_name(step: int) -> str:
    """The folder name of a committed checkpoint."""
    return f"step-{step:09d}"


def draft_name(step: int, attempt: int, token: str) -> str:
    """The folder name while a checkpoint is written."""
    return f"{step_name(step)}.tmp-{attempt}-{token}"


def committed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all folders named like checkpoints, newest first; whether they verify is another matter.

    A missing root is empty.
    """
    found = [(int(match.group(1)), root / name) for name in _names(root) if (match := _STEP.match(name))]
    return sorted(found, reverse=True)


def _names(root: Path) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except FileNotFoundError:
        return []


def put_in_place(draft: Path, target: Path) -> None:
    """Rename a complete draft to its committed name; durable on return. What had that name is deleted.

    A former checkpoint of the step is exchanged with the draft in one system call. Where the filesystem cannot do
    that (NFS), it is renamed aside first: after a crash between the two renames the complete draft is there, and
    `sweep_drafts` puts it in place.

    Raises:
        OSError: the draft is still a draft.
    """
    aside: Path | None = None
    if target.exists():
        aside = _trash_path(target)
        if _exchange(draft, target):
            os.rename(draft, aside)
        else:
            os.rename(target, aside)
            os.rename(draft, target)
    else:
        os.rename(draft, target)
    fsync_dir(target.parent)
    if aside is not None:
        _remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one))


def discard(folder: Path) -> bool:
    """Delete a folder: rename it so that no reader takes it for a checkpoint, then unlink.

    Returns:
        Whether it has lost its name. Failures are logged, never raised: leftovers are swept later.
    """
    aside = _trash_path(folder)
    try:
        os.rename(folder, aside)
    except OSError as error:
        _log.warning("%s cannot be deleted: %s", folder.name, error.strerror)
        return False
    _remove(aside)
    return True


def _trash_path(folder: Path) -> Path:
    return folder.with_name(f"{_TRASH}{folder.name}-{secrets.token_hex(4)}")


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning("%s is deleted in part only: %s", folder.name, error.strerror)


def sweep_trash(root: Path) -> None:
    """Finish deletions that were cut short. Failures are logged."""
    for name in _names(root):
        if name.startswith(_TRASH):
            _remove(root / name)


def sweep_drafts(root: Path, attempt: int) -> None:
    """Settle the drafts of attempts before `attempt`: complete ones whose step has no folder are put in place,
    the others deleted. Failures are logged."""
    for name in _names(root):
        match = _DRAFT.match(name)
        if match and int(match.group(2)) < attempt:
            settle(root / name, root / match.group(1))


def settle(draft: Path, target: Path) -> None:
    """Put a draft that nobody writes any more in place when it is complete and `target` is not there; delete it
    otherwise. Failures are logged."""
    try:
        if not target.exists() and _is_complete(draft):
            os.rename(draft, target)
            fsync_dir(target.parent)
            _log.info("%s was complete but for its name: put in place", target.name)
            return
    except OSError as error:
        _log.warning("%s cannot be put in place: %s", draft.name, error.strerror)
        return
    discard(draft)


def _is_complete(draft: Path) -> bool:
    try:
        Manifest.unseal((draft / MANIFEST).read_bytes())
    except (FileNotFoundError, CorruptCheckpoint):
        return False
    return True
