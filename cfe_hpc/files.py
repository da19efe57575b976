"""Files that survive a kill: written aside, synced and moved over, or appended one whole line at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cfe_hpc.errors import ConfigError, Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "append_ndjson",
    "fsync_dir",
    "fsync_file",
    "lay_up",
    "ndjson_record",
    "read_ndjson",
    "read_toml",
    "tomllib",
    "write_atomic",
    "written_aside",
]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o644, spares: Sequence[Path] = ()) -> None:
    """Replace `path` so that a reader, or a crash at any moment, sees the old file or the new one, whole.

    Args:
        spares: files on the same filesystem, as `lay_up` makes them: one is used up where there is no room.

    Raises:
        OSError: nothing was changed; no temporary file is left.
    """
    with written_aside(path, content, mode=mode, spares=spares) as aside:
        os.replace(aside, path)
    fsync_dir(path.parent)


@contextlib.contextmanager
def written_aside(
    path: Path, content: str | bytes, *, mode: int = 0o644, spares: Sequence[Path] = (), synced: bool = True
) -> Iterator[Path]:
    """A new file beside `path`, to be given that name; it is gone afterwards if it still has its own.

    Args:
        spares: see write_atomic.
        synced: it is durable, too. That waits for whatever else the disk has to write.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        try:
            _write(aside, data, mode, os.O_CREAT | os.O_EXCL, synced)
        except OSError as error:
            if error.errno not in _NO_ROOM or not any(
                _write_over(spare, aside, data, mode, synced) for spare in spares
            ):
                raise
        yield aside
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)


def _write_over(spare: Path, aside: Path, data: bytes, mode: int, synced: bool) -> bool:
    """Make `aside` of a spare, in the blocks that it has; whether that went well. The spare is used up if it was there.

    Whoever renames it has it: of several processes one.
    """
    try:
        os.rename(spare, aside)
        _write(aside, data, mode, 0, synced)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        return False
    return True


def _write(path: Path, data: bytes, mode: int, flags: int, synced: bool) -> None:
    with open(os.open(path, os.O_WRONLY | flags, mode), "wb") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(data)
        stream.truncate()
        if synced:
            stream.flush()
            os.fsync(stream.fileno())


def lay_up(spares: Iterable[Path], size_bytes: int) -> bool:
    """Make the files that are missing, each of as many bytes: room for what must be written though the disk is full.

    Freeing room then would not do: on a shared filesystem somebody else takes it.

    Returns:
        Whether all are there.
    """
    for spare in spares:
        try:
            if not spare.exists():
                # Zeros may be stored as none at all.
                with written_aside(spare, os.urandom(size_bytes), synced=False) as aside:
                    os.replace(aside, spare)
        except OSError:
            return False
    return True


def append_ndjson(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as one line, in a single write; repair a torn last line first.

    A line torn by a kill lacks its newline: the new record starts on a line of its own, so that only the torn
    one is lost. Not-a-number and infinities are written as strings, since JSON has no word for them.

    Raises:
        OSError: the line is not written, or torn.
    """
    line = json.dumps(_plain(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        end = os.lseek(fd, 0, os.SEEK_END)
        torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
        content = (("\n" if torn else "") + line + "\n").encode()
        if os.write(fd, content) < len(content):  # as far as there was room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
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


def read_ndjson(path: Path, *, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of an ndjson file, oldest first; lines that do not parse (torn ones) are skipped, a missing
    file is empty.

    Args:
        last_bytes: read no more than so much of its end; all of it when None.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115 (closed by the with below)
    except FileNotFoundError:
        return
    with stream:
        if last_bytes is not None:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - last_bytes))
        while lines := list(islice(stream, _BLOCK_LINES)):
            yield from _block(lines)


def _block(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    try:
        # One document of them all: line by line it takes twice as long.
        records = json.loads((b"[%b]" % b",".join(lines)).decode())
    except ValueError:
        records = []
    if len(records) != len(lines):  # some are torn
        records = [ndjson_record(line) for line in lines]
    return (record for record in records if isinstance(record, dict))


_BLOCK_LINES = 256
_decode = json.JSONDecoder().raw_decode


def ndjson_record(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None where there is none, or it is torn."""
    text = line.decode("utf-8", errors="replace").strip()
    try:
        # json.loads would look for white space around it once more: a third of what reading a heartbeat costs.
        record, end = _decode(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and end == len(text) else None


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
