"""Builds a token file of text or of token ids: read once to plan, read again to write, renamed when whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from cfe_hpc.data.documents import Document, UnusableSource, file_sha256
from cfe_hpc.data.format import CHUNK_BYTES, DTYPES, FORMAT, FORMAT_VERSION, LIBVER, SPLITS, SplitFacts
from cfe_hpc.data.plan import BuildOptions, Plan, Progress, ScannedSource, content_hash, scan
from cfe_hpc.data.sources import Source, find_sources
from cfe_hpc.errors import DataError, Problem, UsageError
from cfe_hpc.files import fsync_dir, fsync_file

__all__ = ["BuildOptions", "BuildReport", "Progress", "build", "build_from_paths"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What was built; `skipped` holds a line for each source left out."""

    path: str
    size_bytes: int
    dtype: str
    vocab_size: int
    separator: int | None
    splits: Mapping[str, SplitFacts]
    num_sources: int
    source_bytes: int
    skipped: Sequence[str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """A tree of plain JSON values."""
        return dataclasses.asdict(self)


def build_from_paths(
    output: Path,
    paths: Sequence[Path],
    *,
    include: Sequence[str] = (),
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """As `build`, of the files behind `paths`; problems of paths and of contents are reported together."""
    sources, problems = find_sources(paths, include=include, leave_out=output)
    return build(output, sources, options=options, progress=progress, problems=problems)


def build(
    output: Path,
    sources: Sequence[Source],
    *,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
    problems: Sequence[Problem] = (),
) -> BuildReport:
    """Write a token file of `sources`, in their order: aside, then by one rename to `output`.

    The same sources and options give the same bytes. A document goes to validation when the hash of its content is
    below the fraction: other documents do not move it, and equal documents are on the same side. When that leaves
    validation empty, the documents of the lowest hash go there. Memory: a few MiB, and 16 bytes for each document.

    Args:
        problems: found before; reported with those found here.

    Raises:
        UsageError: the options or any of the sources cannot be used; one line for each. Nothing is written.
        DataError: a source changed meanwhile, or the file cannot be written. No temporary file is left.
    """
    started = time.monotonic()
    options = options or BuildOptions()
    _require_output(output, options)
    plan = scan(output, sources, options, problems=problems, progress=progress)
    aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        splits = _write(aside, plan, progress)
        fsync_file(aside)
        os.replace(aside, output)
    except (OSError, RuntimeError) as error:
        _unclosable.append(error)
        what = f"{output}: cannot be written ({_reason(error)})"
        raise DataError(f"{what}; free space or choose another folder") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
    fsync_dir(output.parent)
    return BuildReport(
        path=str(output),
        size_bytes=output.stat().st_size,
        dtype=plan.dtype,
        vocab_size=plan.vocab_size,
        separator=plan.separator,
        splits=splits,
        num_sources=len(plan.scanned),
        source_bytes=sum(facts.source.size_bytes for facts in plan.scanned),
        skipped=plan.skipped,
        seconds=time.monotonic() - started,
    )


def _require_output(output: Path, options: BuildOptions) -> None:
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; name the file to write")
    if output.exists() and not options.overwrite:
        raise UsageError(f"{output}: exists; give --force to replace it")
    if not output.parent.is_dir():
        raise UsageError(f"{output}: no such folder ({output.parent}); make it first")


_unclosable: list[Exception] = []
"""Errors whose frames hold parts of a file that could not be closed: HDF5 (2.0) crashes when those are freed."""


def _reason(error: OSError | RuntimeError) -> str:
    """Why, in the system's words: HDF5 wraps them in many of its own, over several lines."""
    text = getattr(error, "strerror", None) or str(error)
    number = re.search(r"errno = (\d+)", text)
    return os.strerror(int(number[1])) if number else " ".join(text.split())


def _write(aside: Path, plan: Plan, progress: Progress | None) -> dict[str, SplitFacts]:
    total, done = sum(facts.source.size_bytes for facts in plan.scanned), 0
    with h5py.File(aside, "x", libver=LIBVER, locking=False) as file:
        writers = {split: _SplitWriter(file.create_group(split), plan, split) for split in SPLITS}
        for number, facts in enumerate(plan.scanned):
            _write_source(number, facts, plan, writers)
            done += facts.source.size_bytes
            if progress:
                progress("writing", done, total)
        splits = {split: writer.finish() for split, writer in writers.items()}
        _write_header(file, plan)
    return splits


def _write_source(number: int, facts: ScannedSource, plan: Plan, writers: Mapping[str, _SplitWriter]) -> None:
    """Write one source's documents, if they still are those that were planned with."""
    planned = iter(facts.hashes)
    try:
        for document in plan.documents(facts.source):
            value = content_hash(document)
            if value != next(planned, None):
                raise UnusableSource("changed", "")
            writers[plan.split_of(value)].add(document, number)
        if next(planned, None) is not None or file_sha256(facts.source) != facts.sha256:
            raise UnusableSource("changed", "")
    except UnusableSource as error:
        remedy = "build again when nothing writes to it"
        raise DataError(f"{facts.source.path}: changed while it was read; {remedy}") from error


class _SplitWriter:
    """Fills one split's datasets, whole chunks at a time."""

    def __init__(self, group: Any, plan: Plan, split: str) -> None:
        size = plan.num_tokens(split)
        dtype = np.dtype(DTYPES[plan.dtype])
        self._group = group
        self._separator = plan.separator
        self._tokens = _dataset(group, "tokens", size, dtype)
        self._chunk = np.empty(self._tokens.chunks[0], dtype=dtype)
        self._filled = 0
        self._written = 0
        self._starts = [0]
        self._sources: list[int] = []
        self._sha256 = hashlib.sha256()

    def add(self, document: Document, source_number: int) -> None:
        self._append(document)
        if self._separator is not None:
            self._append(np.array([self._separator]))
        self._starts.append(self._written + self._filled)
        self._sources.append(source_number)

    def finish(self) -> SplitFacts:
        self._flush()
        assert self._written == len(self._tokens)
        for name, values, dtype in (("documents", self._starts, "<u8"), ("sources", self._sources, "<u4")):
            _dataset(self._group, name, len(values), np.dtype(dtype))[...] = np.array(values, dtype=dtype)
        facts = SplitFacts(tokens=self._written, documents=len(self._sources), tokens_sha256=self._sha256.hexdigest())
        self._group.attrs["tokens"] = facts.tokens
        self._group.attrs["documents"] = facts.documents
        self._group.attrs["tokens_sha256"] = np.bytes_(facts.tokens_sha256)
        return facts

    def _append(self, tokens: npt.NDArray[Any]) -> None:
        while len(tokens):
            part = tokens[: len(self._chunk) - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == len(self._chunk):
                self._flush()

    def _flush(self) -> None:
        full = self._chunk[: self._filled]
        self._tokens[self._written : self._written + len(full)] = full
        self._sha256.update(full.data)
        self._written += len(full)
        self._filled = 0


def _dataset(group: Any, name: str, size: int, dtype: np.dtype[Any]) -> Any:
    # A chunk is stored whole: small datasets get a small one. maxshape lets an empty dataset be chunked.
    chunk = max(1, min(size, CHUNK_BYTES // dtype.itemsize))
    return group.create_dataset(
        name, shape=(size,), maxshape=(max(size, 1),), chunks=(chunk,), dtype=dtype, fletcher32=True
    )


def _write_header(file: Any, plan: Plan) -> None:
    lines = [
        {
            "name": facts.source.name,
            "bytes": facts.source.size_bytes,
            "sha256": facts.sha256,
            "documents": len(facts.hashes),
        }
        for facts in plan.scanned
    ]
    text = np.frombuffer("".join(json.dumps(line) + "\n" for line in lines).encode(), dtype=np.uint8)
    _dataset(file, "sources", len(text), text.dtype)[...] = text
    # Strings of fixed length: those of variable length lie in a heap that HDF5 keeps no checksum of.
    file.attrs["format"] = np.bytes_(FORMAT)
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["dtype"] = np.bytes_(plan.dtype)
    file.attrs["vocab_size"] = plan.vocab_size
    file.attrs["separator"] = -1 if plan.separator is None else plan.separator
    file.attrs["validation_fraction"] = plan.options.validation_fraction
