"""The code as it is at submission: a copy of the work tree that every attempt of a run starts in.

What git tracks, with the changes that are not committed, and new files that it does not ignore. A copy is named by
what it holds: runs of the same code share one. Whatever is not copied (ignored folders, data, large files, secrets)
is a link to the original, so that relative paths lead where they led.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.launch.secret_files import secret_content, secret_name
from cfe_hpc.runfolder import utc_now
from cfe_hpc.units import format_size

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.launch.provenance import Listing, WorkTree

__all__ = ["MARK", "SNAPSHOTS", "Packed", "folder_of", "strays", "take"]

SNAPSHOTS = ".snapshots"
"""Folder under the runs root that holds them, each under its hash."""

MARK = ".cfe-snapshot.json"
"""In a snapshot: what it was made of. Its time of modification is when a run was last submitted with it."""

_FORMAT = "1"
_TRIES = 3
_UNTRACKED_MOST = 10_000
_NEVER_LINKED = frozenset({".git", "__pycache__", MARK})
"""Programs that look for a repository must not take the copy for the work tree of the original."""

Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A snapshot on disk.

    Attributes:
        folder: the copy of the work tree's top.
        new: it was made just now; else an earlier submission of the same code has made it.
        secrets: tracked paths that were left out since they look like secrets; empty unless it is new.
    """

    folder: Path
    new: bool
    secrets: tuple[str, ...] = ()


def folder_of(loaded: Loaded, work_tree: WorkTree, runs_root: Path) -> Path | None:
    """Where the snapshot of a run that is submitted now lies, or would lie. Writes nothing.

    Returns:
        None when there is none: outside of a git work tree, and with `snapshot.mode = "off"`.
    """
    listing = _wanted(loaded, work_tree)
    return None if listing is None else runs_root / SNAPSHOTS / _name(listing, _files(listing, loaded, runs_root))


def take(loaded: Loaded, work_tree: WorkTree, runs_root: Path, *, told: Told | None = None) -> Packed | None:
    """Have the snapshot of a run that is submitted now: made, or found.

    Args:
        told: called with the bytes copied so far, and those in all, after each file.

    Returns:
        None when there is none, as for `folder_of`.

    Raises:
        ConfigError: it would be larger than `snapshot.size_max`, the runs root has no room for it, or the work tree
            changes all the while.
    """
    for _ in range(_TRIES):
        listing = _wanted(loaded, work_tree)
        if listing is None:
            return None
        files = _files(listing, loaded, runs_root)
        folder = runs_root / SNAPSHOTS / _name(listing, files)
        if (folder / MARK).exists():
            with contextlib.suppress(OSError):  # another user's
                os.utime(folder / MARK)
                _link_rest(listing.top, folder, files)
            return Packed(folder=folder, new=False)
        _refuse_too_much(loaded, listing.top, files)
        try:
            with _beside(folder) as aside:
                runs = _within(listing.top, runs_root)
                named = [path for path in listing.tracked if secret_name(path) and not path.startswith(runs)]
                left_out = named + _copy(listing.top, aside, files, told)
                work_tree = work_tree.again()
                after = work_tree.listing
                if after is None or _name(after, _files(after, loaded, runs_root)) != folder.name:
                    continue  # somebody saved a file meanwhile: the copy is neither what was nor what is
                _link_rest(listing.top, aside, files)
                _mark(aside, listing.top, left_out)
                _publish(aside, folder)
        except OSError as error:
            raise ConfigError([_unwritable(loaded, folder, error)]) from error
        return Packed(folder=folder, new=True, secrets=tuple(left_out))
    assert listing is not None  # there was one
    what, remedy = "changes while it is copied", "wait until it is left alone, or submit with --no-snapshot"
    raise ConfigError([Problem(file=str(listing.top), key="", what=what, remedy=remedy)])


def strays(snapshot: Path) -> Iterator[str]:
    """Paths in a snapshot that it was not made with: what programs have written under relative names. Byte code does
    not count."""
    for folder, folders, names in os.walk(snapshot):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = Path(folder, name)
            if name != MARK and not path.is_symlink() and path.stat().st_mode & stat.S_IWUSR:
                yield str(path.relative_to(snapshot))


def _wanted(loaded: Loaded, work_tree: WorkTree) -> Listing | None:
    if loaded.job.snapshot.mode == "off":
        return None
    listing = work_tree.listing
    # Where variables of git's point somewhere else, the tree is not the one that ranks start in.
    return listing if listing is not None and Path.cwd().is_relative_to(listing.top) else None


def _files(listing: Listing, loaded: Loaded, runs_root: Path) -> dict[str, str]:
    """Path to what stands for its content, of all that is copied: git's mode and hash, or what they would be."""
    runs = _within(listing.top, runs_root)
    submodule = "160000"
    files = {path: " ".join(facts) for path, facts in listing.tracked.items() if facts[0] != submodule}
    most_bytes = loaded.job.snapshot.untracked_max
    fresh = (path for path in listing.untracked if not path.startswith(runs))
    untracked = [path for path in fresh if _small(listing.top / path, most_bytes)]
    if len(untracked) > _UNTRACKED_MOST:
        what = f"holds {len(untracked)} files that git neither tracks nor ignores"
        remedy = "name their folders in .gitignore, or submit with --no-snapshot"
        raise ConfigError([Problem(file=str(listing.top), key="", what=what, remedy=remedy)])
    for path in (*listing.changed, *untracked):
        files.pop(path, None)
        facts = _facts(listing.top / path)
        if facts is not None:
            files[path] = facts
    return {path: facts for path, facts in sorted(files.items()) if not path.startswith(runs) and not secret_name(path)}


def _within(top: Path, runs_root: Path) -> str:
    """How paths begin that are those of runs, not of code."""
    own = runs_root if runs_root != top and runs_root.is_relative_to(top) else runs_root / SNAPSHOTS
    return f"{os.path.relpath(own, top)}/"


def _small(path: Path, most_bytes: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_size <= most_bytes)


def _facts(path: Path) -> str | None:
    """A file's mode and hash as git would have them, so that committing a change makes no other code of it."""
    import hashlib  # late: it loads OpenSSL, and a clean tree needs none

    try:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            mode, content = "120000", os.fsencode(os.readlink(path))
        elif stat.S_ISREG(found.st_mode):
            mode, content = "100755" if found.st_mode & stat.S_IXUSR else "100644", path.read_bytes()
        else:
            return None
    except OSError:
        return None
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return f"{mode} {blob.hexdigest()}"


def _name(listing: Listing, files: Mapping[str, str]) -> str:
    """The snapshot's name: over its files, and over the place that its links lead to."""
    import hashlib

    lines = [_FORMAT, str(listing.top), *(f"{facts} {path}" for path, facts in files.items())]
    return hashlib.sha256("\0".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _refuse_too_much(loaded: Loaded, top: Path, files: Mapping[str, str]) -> None:
    sizes: dict[str, int] = {}
    for path in files:
        with contextlib.suppress(OSError):
            sizes[path] = (top / path).lstat().st_size
    most = loaded.job.snapshot.size_max
    if sum(sizes.values()) <= most:
        return
    largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:3]
    shown = ", ".join(f"{path} {format_size(sizes[path])}" for path in largest)
    problem = Problem(
        file=loaded.job_file,
        key="snapshot.size_max",
        what=f"less than the {format_size(sum(sizes.values()))} of code in {top}; the largest: {shown}",
        value=format_size(most),
        remedy="name data in .gitignore, raise it, or submit with --no-snapshot",
    )
    raise ConfigError([problem])


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, gone afterwards unless it was given that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(top: Path, into: Path, files: Mapping[str, str], told: Told | None) -> list[str]:
    """Copy the files, read-only; the paths of those that hold a secret, which are not copied."""
    held: list[str] = []
    total_bytes = sum((top / path).lstat().st_size for path in files if os.path.lexists(top / path)) if told else 0
    done_bytes = 0
    for path in files:
        source, target = top / path, into / path
        try:
            found = source.lstat()
        except OSError:
            continue  # sparse checkouts have no file: what else is missing is found out afterwards
        target.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISLNK(found.st_mode):
            os.symlink(_target(top, source), target)
        elif stat.S_ISREG(found.st_mode):
            content = source.read_bytes()
            if secret_content(content):
                held.append(path)
                continue
            target.write_bytes(content)
            target.chmod(0o555 if found.st_mode & stat.S_IXUSR else 0o444)
            os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
        done_bytes += found.st_size
        if told is not None:
            told(done_bytes, total_bytes)
    return held


def _target(top: Path, link: Path) -> str:
    """Where the copy of a link leads: where the link does, from another place."""
    target = os.readlink(link)
    lands = os.path.normpath(link.parent / target)
    inside = os.path.commonpath([lands, top]) == str(top)
    return target if os.path.isabs(target) or inside else lands


def _link_rest(top: Path, snapshot: Path, files: Mapping[str, str]) -> None:
    """Link what the folders of copied files hold besides. Links that are there stay as they are."""
    folders = {PurePosixPath(path).parent for path in files}
    folders |= {above for folder in folders for above in folder.parents} | {PurePosixPath(".")}
    for folder in sorted(folders):
        try:
            names = os.listdir(top / folder)
        except OSError:
            continue
        (snapshot / folder).mkdir(parents=True, exist_ok=True)
        have = set(os.listdir(snapshot / folder)) | _NEVER_LINKED
        for name in names:
            if name not in have:
                with contextlib.suppress(FileExistsError):  # somebody else submits the same code
                    os.symlink(top / folder / name, snapshot / folder / name)


def _mark(snapshot: Path, top: Path, left_out: list[str]) -> None:
    facts = {"time": utc_now(), "work_tree": str(top), "left_out": left_out}
    (snapshot / MARK).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _publish(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError:
        if not (folder / MARK).exists():  # else somebody else was first
            raise


def _unwritable(loaded: Loaded, folder: Path, error: OSError) -> Problem:
    what = f"cannot be written: {error.strerror}"
    remedy = "make room there, or submit with --no-snapshot"
    return Problem(file=loaded.site_file, key="storage.runs_root", what=what, value=str(folder.parent), remedy=remedy)
