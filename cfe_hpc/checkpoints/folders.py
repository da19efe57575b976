"""Names and renames in the checkpoints folder: what is committed, a draft, or on its way out.

    step-000000400                    committed, when its manifest verifies
    step-000000400.tmp-<attempt>-<8 hex>   a draft; complete when its manifest is there
    .leaving-step-000000400-<8 hex>   taken out by rotation, whole; it comes back if it was pinned meanwhile
    .trash-step-000000400-<8 hex>     being deleted
    step-000000400.pinned             a mark; see checkpoints.marks

Nothing here reads or writes what the folders hold, but for the manifest's name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
from pathlib import Path

from cfe_hpc.checkpoints import marks
from cfe_hpc.checkpoints.manifest import MANIFEST, Manifest
from cfe_hpc.errors import CorruptCheckpoint
from cfe_hpc.files import fsync_dir

__all__ = [
    "committed",
    "discard",
    "draft_name",
    "put_in_place",
    "set_aside",
    "settle",
    "settle_leaving",
    "step_name",
    "step_of",
    "sweep_drafts",
    "sweep_trash",
    "take_out",
    "trash",
]

_log = logging.getLogger(__name__)
_STEP = re.compile(r"^step-(\d{9,})$")
_DRAFT = re.compile(r"^(step-\d{9,})\.tmp-(\d+)-[0-9a-f]+$")
_LEAVING = re.compile(r"^\.leaving-(step-\d{9,})-[0-9a-f]+$")
_TRASH = ".trash-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def step_name(step: int) -> str:
    """The folder name of a committed checkpoint."""
    return f"step-{step:09d}"


def step_of(name: str) -> int | None:
    """The step of a committed checkpoint's folder; None for any other name."""
    match = _STEP.match(name)
    return None if match is None else int(match.group(1))


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
    """Rename a complete draft to its committed name; durable on return. What had that name is trash then.

    A former checkpoint of the step is exchanged with the draft in one system call. Where the filesystem cannot do
    that (NFS), it is renamed aside first: after a crash between the two renames the complete draft is there, and
    `sweep_drafts` puts it in place.

    Raises:
        OSError: the draft is still a draft.
    """
    if target.exists():
        aside = _trash_path(target)
        if _exchange(draft, target):
            os.rename(draft, aside)
        else:
            os.rename(target, aside)
            try:
                os.rename(draft, target)
            except OSError:
                os.rename(aside, target)
                raise
    else:
        os.rename(draft, target)
    fsync_dir(target.parent)


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
    aside = set_aside(folder)
    if aside is not None:
        _remove(aside)
    return aside is not None


def set_aside(folder: Path) -> Path | None:
    """Rename a folder to trash, which is deleted later; its new path. A failure is logged, and None returned."""
    aside = _trash_path(folder)
    try:
        os.rename(folder, aside)
    except OSError as error:
        _log.warning("%s cannot be deleted: %s", folder.name, error.strerror)
        return None
    return aside


def take_out(folder: Path) -> bool:
    """Rename a committed checkpoint to trash, unless it is pinned, or is being pinned at this moment.

    The mark is looked for after the rename: whoever puts it before has it found here, and gets the checkpoint back;
    whoever puts it later sees that the checkpoint is not there. The rename also makes this client of a network
    filesystem forget what it had cached of the folder, so that a mark made on another node is found.

    Returns:
        Whether it has gone. Failures are logged.
    """
    leaving = folder.with_name(f".leaving-{folder.name}-{secrets.token_hex(4)}")
    try:
        os.rename(folder, leaving)
    except OSError as error:
        _log.warning("%s cannot be deleted: %s", folder.name, error.strerror)
        return False
    return _settle_leaving(leaving, folder)


def settle_leaving(root: Path) -> None:
    """Finish what `take_out` began in a process that died: such a checkpoint is whole, and is put back if pinned."""
    for name in _names(root):
        if match := _LEAVING.match(name):
            _settle_leaving(root / name, root / match.group(1))


def _settle_leaving(leaving: Path, folder: Path) -> bool:
    """Whether `folder` has gone. Two processes may do this to one: each rename succeeds in one of them only."""
    if marks.holds(folder):
        with contextlib.suppress(OSError):  # the step was saved again
            os.rename(leaving, folder)
            _log.info("%s stays: it is pinned", folder.name)
            return False
    with contextlib.suppress(FileNotFoundError):
        os.rename(leaving, _trash_path(folder))
    return not folder.exists()


def _trash_path(folder: Path) -> Path:
    return folder.with_name(f"{_TRASH}{folder.name}-{secrets.token_hex(4)}")


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning("%s is deleted in part only: %s", folder.name, error.strerror)


def trash(root: Path) -> list[Path]:
    """What is being deleted, or was when a process died."""
    return [root / name for name in _names(root) if name.startswith(_TRASH)]


def sweep_trash(root: Path) -> None:
    """Finish deletions that were cut short. Failures are logged."""
    for folder in trash(root):
        _remove(folder)


def sweep_drafts(root: Path, attempt: int) -> None:
    """Settle the drafts of attempts before `attempt`: complete ones whose step has no folder are put in place,
    the others become trash. Failures are logged."""
    for name in _names(root):
        match = _DRAFT.match(name)
        if match and int(match.group(2)) < attempt:
            settle(root / name, root / match.group(1))


def settle(draft: Path, target: Path) -> None:
    """Put a draft that nobody writes any more in place when it is complete and `target` is not there; otherwise it
    becomes trash. Failures are logged."""
    try:
        if not target.exists() and _is_complete(draft):
            os.rename(draft, target)
            fsync_dir(target.parent)
            _log.info("%s was complete but for its name: put in place", target.name)
            return
    except OSError as error:
        _log.warning("%s cannot be put in place: %s", draft.name, error.strerror)
        return
    set_aside(draft)


def _is_complete(draft: Path) -> bool:
    try:
        Manifest.unseal((draft / MANIFEST).read_bytes())
    except (FileNotFoundError, CorruptCheckpoint):
        return False
    return True
