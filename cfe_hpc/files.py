"""Files that survive a kill: written aside, synced and moved over, or appended one whole line at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.errors import ConfigError, Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["append_ndjson", "fsync_dir", "fsync_file", "read_ndjson", "read_toml", "write_atomic"]


def fsync_file(path: Path) -> None:
    """Make durable what others have written to a file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_dir(folder: Path) -> None:
    """Make renames and new names in `folder` durable. Filesystems that cannot sync a folder are left alone.

    Raises:
        OSError: the disk failed.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(fd)


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    """Replace `path` so that a reader, or a crash at any moment, sees the old file or the new one, whole.

    Raises:
        OSError: nothing was changed; no temporary file is left.
    """
    data = content.encode() if isinstance(content, str) else content
    fd, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as stream:
            os.fchmod(fd, mode)
            stream.write(data)
            stream.flush()
            os.fsync(fd)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    fsync_dir(path.parent)


def append_ndjson(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as one line, in a single write; repair a torn last line first.

    A line torn by a kill lacks its newline: the new record starts on a line of its own, so that only the torn
    one is lost. Not-a-number and infinities are written as strings, since JSON has no word for them.
    """
    line = json.dumps(_plain(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        end = os.lseek(fd, 0, os.SEEK_END)
        torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
        os.write(fd, (("\n" if torn else "") + line + "\n").encode())
    finally:
        os.close(fd)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def read_ndjson(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of an ndjson file, oldest first; lines that do not parse (torn ones) are skipped, a missing
    file is empty."""
    try:
        stream = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by the with below)
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def read_toml(path: Path, *, shown_as: str | None = None) -> dict[str, Any]:
    """The table of a TOML file.

    Args:
        shown_as: the name used in messages; `path` as given when None.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8 or not TOML; names the file and the line.
    """
    name = shown_as or str(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = Problem(file=name, key="", what="no such file", remedy="check the path")
    except IsADirectoryError:
        problem = Problem(file=name, key="", what="is a folder", remedy="name a TOML file")
    except UnicodeDecodeError as error:
        problem = Problem(
            file=name, key="", what=f"not UTF-8 text (byte {error.start})", remedy="save the file as UTF-8"
        )
    except tomllib.TOMLDecodeError as error:
        problem = Problem(file=name, key="", what=f"not valid TOML: {error}", remedy="mend that line")
    except OSError as error:
        problem = Problem(file=name, key="", what=f"cannot be read: {error.strerror}", remedy="check its rights")
    raise ConfigError([problem])
