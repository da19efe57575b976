"""What a token file is built from: the files behind the paths a user names, and the embedded default corpus."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from cfe_hpc.errors import DataError, Problem, UsageError

__all__ = ["ARRAY_SUFFIXES", "DEFAULT_STDLIB_BYTES", "Source", "find_sources", "stdlib_sources"]

ARRAY_SUFFIXES = (".npy", ".bin")
DEFAULT_STDLIB_BYTES = 32 << 20
# Installed packages differ between machines; the tests hold files that are broken on purpose.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file to read.

    Attributes:
        path: where it is.
        name: how the token file remembers it: relative to what the user named, without this machine's folders.
        size_bytes: its size when it was found.
    """

    path: Path
    name: str
    size_bytes: int

    @property
    def is_array(self) -> bool:
        """Token ids in a .npy or .bin file, rather than text."""
        return self.path.suffix.lower() in ARRAY_SUFFIXES


def find_sources(
    paths: Sequence[Path], *, include: Sequence[str] = (), leave_out: Path | None = None
) -> tuple[list[Source], list[Problem]]:
    """The files behind `paths`, folders searched in sorted order, each file once.

    Hidden files and folders inside a folder are left out; links to folders are not followed.

    Args:
        include: shell patterns of file names, such as "*.py"; inside folders others are left out. None: all.
        leave_out: a file that is no source although a folder holds it: the output.

    Returns:
        The sources, and a problem for each path that leads to none.
    """
    sources: list[Source] = []
    problems: list[Problem] = []
    seen = {os.path.realpath(leave_out)} if leave_out else set()
    for path in paths:
        found = 0
        for file, name in _files(path, include, problems):
            found += 1
            real = os.path.realpath(file)
            if real in seen:
                continue
            seen.add(real)
            source = _source(file, name, problems)
            if source:
                sources.append(source)
        if not found and path.is_dir():
            what = f"no file matches {' or '.join(include)}" if include else "folder without any file"
            problems.append(Problem(file=str(path), key="", what=what, remedy="name a folder with text files"))
    return sources, problems


def _files(path: Path, include: Sequence[str], problems: list[Problem]) -> Iterator[tuple[Path, str]]:
    if not path.is_dir():
        yield path, path.name
        return

    def unreadable(error: OSError) -> None:
        what = f"folder cannot be read: {error.strerror}"
        problems.append(Problem(file=str(error.filename), key="", what=what, remedy="check its rights"))

    root_name = path.resolve().name
    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or (include and not any(fnmatch(name, pattern) for pattern in include)):
                continue
            file = Path(folder, name)
            yield file, f"{root_name}/{file.relative_to(path).as_posix()}"


def _source(file: Path, name: str, problems: list[Problem]) -> Source | None:
    try:
        facts = file.stat()
    except FileNotFoundError:
        remedy = "remove the broken link" if file.is_symlink() else "check the path"
        problems.append(Problem(file=str(file), key="", what="no such file or folder", remedy=remedy))
        return None
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        problems.append(Problem(file=str(file), key="", what=what, remedy="check its rights"))
        return None
    if not stat.S_ISREG(facts.st_mode):
        what = "neither a file nor a folder"
        problems.append(Problem(file=str(file), key="", what=what, remedy="name text files or .npy or .bin arrays"))
        return None
    return Source(path=file, name=name, size_bytes=facts.st_size)


def stdlib_sources(*, max_bytes: int = DEFAULT_STDLIB_BYTES) -> list[Source]:
    """The source code of the running Python's own standard library: real text that is on every machine.

    Sorted by name, named "stdlib/…", without installed packages and without Python's own tests.

    Args:
        max_bytes: stop before the file that would exceed it.

    Raises:
        DataError: this Python carries no source code (a frozen or zipped build).
        UsageError: `max_bytes` is less than the first file.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _python_files(root) if file.is_file()]
    if not files:
        raise DataError(f"{root}: this Python carries no source code of its standard library; name text files instead")
    sources: list[Source] = []
    total = 0
    for file in files:
        size_bytes = file.stat().st_size
        total += size_bytes
        if total > max_bytes:
            break
        name = f"stdlib/{file.relative_to(root).as_posix()}"
        sources.append(Source(path=file, name=name, size_bytes=size_bytes))
    if not sources:
        raise UsageError(f"--max-bytes: less than the first file ({max_bytes}); give at least 1MiB")
    return sources


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_STDLIB)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
