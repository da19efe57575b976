"""The first reading of the sources: finds every problem, and decides vocabulary, type and split before writing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfe_hpc.data.documents import Document, UnusableSource, documents, file_sha256
from cfe_hpc.data.format import DTYPES
from cfe_hpc.data.sources import Source
from cfe_hpc.errors import Problem, UsageError

__all__ = ["BuildOptions", "Plan", "Progress", "ScannedSource", "content_hash", "scan"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done, and bytes in all."""

_BYTES = 256
_MAX_VOCAB = 1 << 16
_MIN_DOCUMENT = 16
# Bytes that no valid UTF-8 holds, and NUL, which text sources may not hold either.
_NEVER_IN_TEXT = frozenset({0x00, 0xC0, 0xC1, *range(0xF5, 0x100)})


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build.

    Attributes:
        dtype: "uint8", "uint16", or "auto": uint8 when the vocabulary fits.
        separator: the token that ends each document; "auto": 0 for text, none for arrays; None: none.
        vocab_size: ids are below it; None: 256 for text, the highest id and one more for arrays.
        validation_fraction: share of documents held out, 0 (no validation split) to below 1.
        max_document_tokens: longer documents are cut, so that a single long file can be split too.
        skip_unusable: leave out files that are no text, with a line in the report, instead of refusing.
        overwrite: replace a file that is there.
    """

    dtype: str = "auto"
    separator: int | str | None = "auto"
    vocab_size: int | None = None
    validation_fraction: float = 0.05
    max_document_tokens: int = 1 << 16
    skip_unusable: bool = False
    overwrite: bool = False


@dataclass(slots=True, kw_only=True)
class ScannedSource:
    """One source as it was first read: its SHA-256, and the content hash of each document."""

    source: Source
    sha256: str
    hashes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be written.

    Attributes:
        separator: the token that ends each document, or None.
        id_limit: what ids of arrays must be below.
        vocab_size: every token is below it.
        dtype: "uint8" or "uint16".
        validation_below: documents whose content hash is below it are held out.
        scanned: the usable sources, in order.
        skipped: a line for each source left out.
    """

    options: BuildOptions
    separator: int | None
    id_limit: int
    vocab_size: int
    dtype: str
    validation_below: int
    scanned: Sequence[ScannedSource]
    skipped: Sequence[str]

    def split_of(self, document_hash: int) -> str:
        """The split of a document: a function of its content and the fraction alone."""
        return "validation" if document_hash < self.validation_below else "train"

    def documents(self, source: Source) -> Iterator[Document]:
        """As `documents.documents`, cut as this plan was made."""
        return _documents(source, self.options, self.separator, self.id_limit)

    def num_tokens(self, split: str) -> int:
        """Tokens of a split, separators counted."""
        extra = self.separator is not None
        return sum(
            tokens + extra
            for facts in self.scanned
            for tokens, value in zip(facts.tokens, facts.hashes, strict=True)
            if self.split_of(value) == split
        )


def content_hash(document: Document) -> int:
    """64 bits of a document's content, for its place in the split."""
    return int.from_bytes(hashlib.blake2b(document.data, digest_size=8, person=b"cfe_hpc split").digest(), "big")


def scan(
    output: Path,
    sources: Sequence[Source],
    options: BuildOptions,
    *,
    problems: Sequence[Problem] = (),
    progress: Progress | None = None,
) -> Plan:
    """Read every source once.

    Args:
        output: named in messages.
        problems: found before; reported with those found here.

    Raises:
        UsageError: options or sources cannot be used; one line for each.
    """
    _require_options(options)
    arrays = bool(sources) and all(source.is_array for source in sources)
    separator = _separator(options, arrays)
    limit = options.vocab_size or (_BYTES if options.dtype == "uint8" else _MAX_VOCAB)
    found = [*problems, *([] if arrays else _arrays_among_text(sources))]
    skipped: list[str] = []
    scanned: list[ScannedSource] = []
    highest, done, total = -1, 0, sum(source.size_bytes for source in sources)
    for source in sources:
        try:
            facts, top = _scan_source(source, options, separator, limit)
            scanned.append(facts)
            highest = max(highest, top)
        except UnusableSource as error:
            problem = Problem(file=str(source.path), key="", what=error.what, remedy=error.remedy)
            if options.skip_unusable:
                skipped.append(str(problem))
            else:
                found.append(problem)
        done += source.size_bytes
        if progress:
            progress("reading", done, total)
    if not found and not any(facts.hashes for facts in scanned):
        found.append(Problem(file=str(output), key="", what="the sources hold no text", remedy="name other sources"))
    if found:
        raise UsageError("\n".join(str(problem) for problem in found))
    vocab_size = max(options.vocab_size or (highest + 1 if arrays else _BYTES), (separator or 0) + 1)
    return Plan(
        options=options,
        separator=separator,
        id_limit=limit,
        vocab_size=vocab_size,
        dtype=_dtype(options, vocab_size),
        validation_below=_validation_below(output, scanned, options.validation_fraction),
        scanned=scanned,
        skipped=skipped,
    )


def _documents(source: Source, options: BuildOptions, separator: int | None, id_limit: int) -> Iterator[Document]:
    return documents(source, max_tokens=options.max_document_tokens, separator=separator, id_limit=id_limit)


def _scan_source(
    source: Source, options: BuildOptions, separator: int | None, id_limit: int
) -> tuple[ScannedSource, int]:
    facts, highest = ScannedSource(source=source, sha256=""), -1
    for document in _documents(source, options, separator, id_limit):
        facts.tokens.append(len(document))
        facts.hashes.append(content_hash(document))
        highest = max(highest, int(document.max()))
    facts.sha256 = file_sha256(source)
    return facts, highest


def _arrays_among_text(sources: Sequence[Source]) -> list[Problem]:
    remedy = "build a file of one kind, or choose files with --include"
    what = "token ids among text files"
    return [Problem(file=str(source.path), key="", what=what, remedy=remedy) for source in sources if source.is_array]


def _require_options(options: BuildOptions) -> None:
    if options.dtype not in ("auto", *DTYPES):
        raise UsageError(f"--dtype: no such type ({options.dtype}); give auto, uint8 or uint16")
    if not 0 <= options.validation_fraction < 1:
        raise UsageError(f"--validation: not a share ({options.validation_fraction}); give 0 to below 1, such as 0.05")
    if options.max_document_tokens < _MIN_DOCUMENT:
        short = options.max_document_tokens
        raise UsageError(f"--max-document: too short ({short}); give at least {_MIN_DOCUMENT} tokens")
    if options.vocab_size is not None and not 1 <= options.vocab_size <= _MAX_VOCAB:
        raise UsageError(f"--vocab-size: out of range ({options.vocab_size}); give 1 to {_MAX_VOCAB}")


def _separator(options: BuildOptions, arrays: bool) -> int | None:
    wanted = options.separator
    if wanted == "auto":
        return None if arrays else 0
    if wanted is None:
        return None
    if not isinstance(wanted, int) or not 0 <= wanted < _MAX_VOCAB:
        raise UsageError(f"--separator: not a token ({wanted}); give a number below {_MAX_VOCAB}, auto or none")
    if not arrays and wanted < _BYTES and wanted not in _NEVER_IN_TEXT:
        raise UsageError(f"--separator: may occur in text ({wanted}); give 0, 255, or 256 for uint16")
    return wanted


def _dtype(options: BuildOptions, vocab_size: int) -> str:
    if options.dtype == "auto":
        return "uint8" if vocab_size <= _BYTES else "uint16"
    if options.dtype == "uint8" and vocab_size > _BYTES:
        raise UsageError(f"--dtype: uint8 is too narrow for a vocabulary of {vocab_size}; give uint16")
    return options.dtype


def _validation_below(output: Path, scanned: Sequence[ScannedSource], fraction: float) -> int:
    if fraction == 0:
        return 0
    hashes = [value for facts in scanned for value in facts.hashes]
    below = max(int(fraction * 2**64), min(hashes) + 1)
    if max(hashes) < below:
        raise UsageError(
            f"{output}: too few documents to hold some out ({len(set(hashes))} distinct); "
            "give more text, a smaller --max-document, or --validation 0"
        )
    return below
