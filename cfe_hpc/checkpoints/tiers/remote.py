"""Copies of checkpoints wherever fsspec reaches: objects in a bucket, or files elsewhere. No torch.

    <remote>/<run id>/step-000000400/   the files of the shared checkpoint; the manifest is written last, deleted first

Credentials are fsspec's own affair: the environment, or its configuration files. They are never in the URL.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.folders import step_name, step_of
from cfe_hpc.checkpoints.io.shard import data_facts, write_data, write_file
from cfe_hpc.checkpoints.layout import CHUNK_BYTES
from cfe_hpc.checkpoints.manifest import MANIFEST, Manifest, ShardIndex, data_name, index_name
from cfe_hpc.checkpoints.reader import parse_manifest, read_manifest_bytes
from cfe_hpc.checkpoints.tiers.transfer import InOrder
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint

__all__ = ["Remote"]

T = TypeVar("T")

_WAITS_S = (1.0, 4.0, 16.0)
"""Before the second, third and fourth try of one file; then it is given up."""


class Remote:
    """One run's checkpoints beyond the shared filesystem."""

    def __init__(self, url: str, run_id: str) -> None:
        """Connect, as far as that filesystem has something to connect to.

        Raises:
            CheckpointError: fsspec, or its part for this kind of URL, is not installed; or it refuses the URL.
        """
        try:
            from fsspec.core import url_to_fs
        except ModuleNotFoundError as error:
            raise CheckpointError(f"checkpoint.remote: {url}: pip install cfe-hpc[remote]") from error
        try:
            # What it has listed before is not what is there now.
            self._files, base = url_to_fs(url, use_listings_cache=False)
        except Exception as error:
            raise CheckpointError(f"checkpoint.remote: {url}: {type(error).__name__}: {error}") from error
        self._run_id, self._base = run_id, f"{base.rstrip('/')}/{run_id}"

    def steps(self) -> list[int]:
        """Steps whose manifest is there, newest first; whether they verify is another matter.

        Raises:
            CheckpointError: the remote cannot be listed.
        """

        def names(folder: str) -> list[str]:
            try:
                return [str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(folder, detail=False)]
            except FileNotFoundError:
                return []

        def find() -> list[int]:
            named = ((step_of(name), name) for name in names(self._base))
            return [step for step, name in named if step is not None and MANIFEST in names(f"{self._base}/{name}")]

        return sorted(_retried("its checkpoints", find), reverse=True)

    def push(self, folder: Path) -> int:
        """Copy a committed checkpoint, every byte checked on the way.

        Returns:
            Bytes copied: none when it is there already.

        Raises:
            CorruptCheckpoint: the shared copy is not what was written.
            CheckpointError: a file could not be copied, tried several times. There is no manifest then.
        """
        sealed = read_manifest_bytes(folder)
        manifest = parse_manifest(sealed, folder.name, self._run_id)
        target = f"{self._base}/{folder.name}"
        if _retried(MANIFEST, self._read_if_there, f"{target}/{MANIFEST}") == sealed:
            return 0
        with contextlib.suppress(Exception):  # object stores have no folders; elsewhere the first file tells
            self._files.makedirs(target, exist_ok=True)
        _retried(MANIFEST, self._delete, f"{target}/{MANIFEST}")
        for rank in range(manifest.identity.world_size):
            content = (folder / index_name(rank)).read_bytes()
            _check_index(content, rank, manifest)
            _retried(index_name(rank), self._write_bytes, f"{target}/{index_name(rank)}", content)
            sums = _retried(data_name(rank), self._stream_out, folder / data_name(rank), f"{target}/{data_name(rank)}")
            facts = manifest.files[data_name(rank)]
            if data_facts(facts.size_bytes, sums) != facts:
                raise CorruptCheckpoint(f"{folder.name}/{data_name(rank)} is altered")
        _retried(MANIFEST, self._write_bytes, f"{target}/{MANIFEST}", sealed)
        return manifest.size_bytes

    def _stream_out(self, path: Path, target: str) -> list[int]:
        sums, buffer = [], memoryview(bytearray(CHUNK_BYTES))
        with open(path, "rb", buffering=0) as source, self._files.open(target, "wb") as stream:
            while got := _read_chunk(source, buffer):
                sums.append(crc32c(buffer[:got]))
                stream.write(buffer[:got])
        return sums

    def _write_bytes(self, target: str, content: bytes) -> None:
        with self._files.open(target, "wb") as stream:
            stream.write(content)

    def retain(self, keep_last: int) -> list[int]:
        """Delete all but the newest `keep_last` checkpoints there; their steps, newest first.

        Raises:
            CheckpointError: one could not be deleted.
        """
        doomed = self.steps()[keep_last:]
        for step in doomed:
            target = f"{self._base}/{step_name(step)}"
            _retried(step_name(step), self._delete, f"{target}/{MANIFEST}")
            _retried(step_name(step), self._delete, target)
        return doomed

    def _delete(self, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(target, recursive=True)

    def manifest(self, step: int) -> bytes:
        """A checkpoint's manifest, checked. Raises CorruptCheckpoint, CheckpointError."""
        content = _retried(MANIFEST, self._read_bytes, f"{self._base}/{step_name(step)}/{MANIFEST}")
        parse_manifest(content, step_name(step), self._run_id)
        return content

    def _read_bytes(self, path: str) -> bytes:
        with self._files.open(path, "rb") as stream:
            return bytes(stream.read())

    def _read_if_there(self, path: str) -> bytes:
        try:
            return self._read_bytes(path)
        except FileNotFoundError:
            return b""

    def fetch(self, manifest: Manifest, ranks: Iterable[int], draft: Path) -> None:
        """Copy shards into a draft, every byte checked on the way; durable on return.

        Raises:
            CorruptCheckpoint: they are not what was written.
            CheckpointError: they could not be copied, tried several times.
            OSError: they could not be written.
        """
        source = f"{self._base}/{step_name(manifest.identity.step)}"
        for rank in ranks:
            content = _retried(index_name(rank), self._read_bytes, f"{source}/{index_name(rank)}")
            index = _check_index(content, rank, manifest)
            sums = _retried(
                data_name(rank),
                self._stream_in,
                f"{source}/{data_name(rank)}",
                draft / data_name(rank),
                index.data_bytes,
            )
            if sums != index.chunks:
                raise CorruptCheckpoint(f"{data_name(rank)} is altered")
            write_file(draft / index_name(rank), content)

    def _stream_in(self, source: str, path: Path, size_bytes: int) -> tuple[int, ...]:
        path.unlink(missing_ok=True)
        with self._files.open(source, "rb") as stream:
            return write_data(path, InOrder(size_bytes, partial(_fill, stream)))


def _check_index(content: bytes, rank: int, manifest: Manifest) -> ShardIndex:
    facts, name = manifest.files[index_name(rank)], index_name(rank)
    if (len(content), crc32c(content)) != (facts.size_bytes, facts.crc32c):
        raise CorruptCheckpoint(f"{name} is not the file that the manifest names: its checksum differs")
    index = ShardIndex.unseal(content, name)
    if manifest.files[data_name(rank)] != data_facts(index.data_bytes, index.chunks):
        raise CorruptCheckpoint(f"{data_name(rank)} has other checksums in its index than in the manifest")
    return index


def _fill(stream: Any, out: memoryview) -> None:
    if _read_chunk(stream, out) < len(out):
        raise CorruptCheckpoint("a data file is truncated")


def _read_chunk(stream: Any, out: memoryview) -> int:
    """Fill `out` as far as the stream goes; the bytes read."""
    done = 0
    while done < len(out):
        part = stream.read(len(out) - done)
        if not part:
            break
        out[done : done + len(part)] = part
        done += len(part)
    return done


def _retried(what: str, act: Callable[..., T], *arguments: Any) -> T:
    """Networks fail for moments. Raises CheckpointError, naming `what`, when they fail for longer."""
    for wait_s in (*_WAITS_S, None):
        try:
            return act(*arguments)
        except (CorruptCheckpoint, FileNotFoundError):
            raise
        except (PermissionError, NotADirectoryError) as error:  # that does not pass with time
            raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
        except Exception as error:  # each of fsspec's filesystems has errors of its own
            if wait_s is None:
                raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
            time.sleep(wait_s)
    raise AssertionError
