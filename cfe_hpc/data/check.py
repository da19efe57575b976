"""Checks a token file, every byte of it, and says what it holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfe_hpc.data.format import READ_ERRORS, SPLITS, TokenFileFacts, open_token_file, read_facts
from cfe_hpc.data.plan import Progress
from cfe_hpc.errors import DataError

__all__ = ["CheckReport", "SplitStatistics", "check"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStatistics:
    """What one split holds.

    Attributes:
        vocab_used: number of distinct tokens.
        entropy_bits: of a token drawn from the split, alone: the loss of a model that knows frequencies only is
            this times ln 2 nats.
        share: of the tokens of all splits.
        longest_document: in tokens, its separator counted.
    """

    tokens: int
    documents: int
    vocab_used: int
    entropy_bits: float
    share: float
    longest_document: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The outcome; the file is good when `problems`, one line each, is empty. Statistics are of good splits only."""

    path: str
    size_bytes: int
    problems: Sequence[str]
    dtype: str | None = None
    vocab_size: int | None = None
    separator: int | None = None
    num_sources: int | None = None
    source_bytes: int | None = None
    splits: Mapping[str, SplitStatistics] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A tree of plain JSON values, with `ok`."""
        return {"ok": not self.problems, **dataclasses.asdict(self)}


def check(path: Path, *, progress: Progress | None = None) -> CheckReport:
    """Read every chunk through its checksum, compare tokens with their SHA-256 and the index with the tokens.

    Damage is reported, not raised: all of it, with the split, the tokens and the bytes of the file that it lies in.
    """
    size_bytes = path.stat().st_size if path.is_file() else 0
    try:
        file = open_token_file(path)
    except DataError as error:
        return CheckReport(path=str(path), size_bytes=size_bytes, problems=str(error).splitlines())
    with file:
        try:
            facts = read_facts(path, file)
        except DataError as error:
            return CheckReport(path=str(path), size_bytes=size_bytes, problems=str(error).splitlines())
        checks = {split: _SplitCheck(path, file, facts, split, progress) for split in SPLITS}
        statistics = {split: splitcheck.run() for split, splitcheck in checks.items()}
        problems = [problem for splitcheck in checks.values() for problem in splitcheck.problems]
        of_documents = np.concatenate([splitcheck.document_sources for splitcheck in checks.values()])
        sources, wrong = _check_sources(path, file, None if problems else of_documents)
    total = sum(split.tokens for split in facts.splits.values())
    return CheckReport(
        path=str(path),
        size_bytes=size_bytes,
        problems=[*problems, *wrong],
        dtype=facts.dtype,
        vocab_size=facts.vocab_size,
        separator=facts.separator,
        num_sources=len(sources),
        source_bytes=sum(int(source["bytes"]) for source in sources),
        splits={
            split: dataclasses.replace(found, share=found.tokens / total)
            for split, found in statistics.items()
            if found is not None
        },
    )


class _SplitCheck:
    """One split, read once from end to end."""

    def __init__(self, path: Path, file: Any, facts: TokenFileFacts, split: str, progress: Progress | None) -> None:
        self.problems: list[str] = []
        self.document_sources = np.empty(0, dtype=np.int64)
        self._path, self._file, self._split, self._progress = path, file, split, progress
        self._facts, self._stated = facts, facts.splits[split]

    def run(self) -> SplitStatistics | None:
        """The statistics; None when the split is damaged, with `problems` telling how."""
        starts = self._index()
        ends = None if starts is None else starts[1:] - 1
        counts = np.zeros(1 << 16, dtype=np.int64)
        digest = hashlib.sha256()
        for start, tokens in self._chunks():
            digest.update(tokens.data)
            counts += np.bincount(tokens, minlength=len(counts))
            if ends is not None:
                self._check_separators(start, tokens, ends)
        if not self.problems and digest.hexdigest() != self._stated.tokens_sha256:
            self._problem("tokens", "differ from their SHA-256")
        if counts[self._facts.vocab_size :].any():
            self._problem("tokens", f"hold tokens beyond the vocabulary of {self._facts.vocab_size}")
        if self.problems or starts is None:
            return None
        return SplitStatistics(
            tokens=self._stated.tokens,
            documents=self._stated.documents,
            vocab_used=int(np.count_nonzero(counts)),
            entropy_bits=_entropy_bits(counts),
            share=0.0,
            longest_document=int(np.diff(starts).max(initial=0)),
        )

    def _problem(self, part: str, what: str) -> None:
        line = f"{self._path}: {self._split}/{part}: {what}; build the file again from its sources"
        if line not in self.problems:
            self.problems.append(line)

    def _chunks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        dataset = self._file[self._split]["tokens"]
        step = dataset.chunks[0]
        for start in range(0, len(dataset), step):
            stop = min(start + step, len(dataset))
            try:
                tokens = dataset[start:stop]
            except READ_ERRORS:
                self._problem("tokens", f"damaged in tokens {start} to {stop - 1}{_where(dataset, start)}")
            else:
                yield start, tokens
            if self._progress:
                self._progress(f"checking {self._split}", stop, len(dataset))

    def _index(self) -> npt.NDArray[np.int64] | None:
        stated = self._stated
        try:
            group = self._file[self._split]
            starts: npt.NDArray[np.int64] = group["documents"][...].astype(np.int64)
            sources = group["sources"][...].astype(np.int64)
        except READ_ERRORS as error:
            self._problem("documents", f"the document index is damaged ({' '.join(str(error).split())})")
            return None
        whole = len(starts) == stated.documents + 1 and starts[0] == 0 and starts[-1] == stated.tokens
        if not whole or (np.diff(starts) <= 0).any() or len(sources) != stated.documents:
            self._problem("documents", "the document index does not fit the tokens")
            return None
        self.document_sources = sources
        return starts

    def _check_separators(self, start: int, tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> None:
        if self._facts.separator is None:
            return
        first, last = np.searchsorted(ends, [start, start + len(tokens)])
        found = np.flatnonzero(tokens == self._facts.separator) + start
        if not np.array_equal(found, ends[first:last]):
            self._problem("documents", "documents do not end at the separators")


def _where(dataset: Any, start: int) -> str:
    try:
        chunk = dataset.id.get_chunk_info_by_coord((start,))
    except READ_ERRORS:
        return ""
    return f" (bytes {chunk.byte_offset} to {chunk.byte_offset + chunk.size - 1} of the file)"


def _entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    total = int(counts.sum())
    shares = counts[counts > 0] / total if total else np.ones(1)
    return max(0.0, -math.fsum((shares * np.log2(shares)).tolist()))


def _check_sources(
    path: Path, file: Any, document_sources: npt.NDArray[np.int64] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The source list, and what is wrong with it; compared with the documents' sources unless these are None."""
    remedy = "build the file again from its sources"
    try:
        sources = [json.loads(line) for line in file["sources"][...].tobytes().splitlines()]
        documents = [int(source["documents"]) for source in sources]
    except READ_ERRORS as error:
        return [], [f"{path}: sources: the list is damaged ({' '.join(str(error).split())}); {remedy}"]
    if document_sources is not None:
        counted = np.bincount(document_sources, minlength=len(sources))
        if counted.tolist() != documents:
            return sources, [f"{path}: sources: the list does not fit the document index; {remedy}"]
    return sources, []
