"""Cuts sources into documents: pieces of text of whole lines, or runs of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from cfe_hpc.data.sources import Source

__all__ = ["Document", "UnusableSource", "documents", "file_sha256"]

Document: TypeAlias = npt.NDArray[Any]
"""uint8 (bytes of text) or little-endian uint16 (token ids), one dimension, at least one token."""

_BLOCK_BYTES = 1 << 20
_MAX_CONTINUATION_BYTES = 3  # of one character in UTF-8


class UnusableSource(Exception):
    """A source that no documents can be made of; `what` is wrong and `remedy`, what to do."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


def documents(source: Source, *, max_tokens: int, separator: int | None, id_limit: int) -> Iterator[Document]:
    """The documents of a source, in order, without their separators. An empty file has none.

    A text file is one document; when longer than `max_tokens` bytes it is cut after the first line that reaches
    it, or at twice that between characters. An array is cut after each separator (there is none in text), at the
    rows of a two-dimensional one, and every `max_tokens` tokens.

    Args:
        id_limit: ids of arrays must be below it; 65536 at most.

    Raises:
        UnusableSource: while iterating: not text, not UTF-8, not an array of such ids, or unreadable.
    """
    try:
        if source.is_array:
            yield from _array_documents(source, max_tokens, separator, id_limit)
            return
        with open(source.path, "rb") as stream:
            yield from _text_documents(stream, max_tokens)
    except OSError as error:
        raise _unreadable(error) from error


def file_sha256(source: Source) -> str:
    """SHA-256 of the file's bytes, hexadecimal. Raises UnusableSource when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(source.path, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise _unreadable(error) from error
    return digest.hexdigest()


def _unreadable(error: OSError) -> UnusableSource:
    return UnusableSource(f"cannot be read: {error.strerror or error}", "check its rights and its disk")


def _text_documents(stream: BinaryIO, max_bytes: int) -> Iterator[Document]:
    buffer = b""
    position = 0
    while True:
        # More than 2 * max_bytes lie ahead of each cut, unless the file has ended: blocks leave no trace in the cuts.
        while len(buffer) <= 2 * max_bytes and (block := stream.read(max(_BLOCK_BYTES, 2 * max_bytes))):
            buffer += block
        if not buffer:
            return
        ended = len(buffer) <= 2 * max_bytes
        taken = 0
        while taken < len(buffer) and (ended or len(buffer) - taken > 2 * max_bytes):
            cut = _cut(buffer, taken, max_bytes)
            piece = buffer[taken:cut]
            _require_text(piece, position + taken)
            yield np.frombuffer(piece, dtype=np.uint8)
            taken = cut
        buffer = buffer[taken:]
        position += taken


def _cut(buffer: bytes, start: int, max_bytes: int) -> int:
    end = min(len(buffer), start + 2 * max_bytes)
    if end - start <= max_bytes:
        return end
    line_end = buffer.find(b"\n", start + max_bytes - 1, end)
    if line_end >= 0:
        return line_end + 1
    for _ in range(_MAX_CONTINUATION_BYTES):
        if end < len(buffer) and buffer[end] & 0xC0 == 0x80:
            end -= 1
    return end


def _require_text(piece: bytes, position: int) -> None:
    nul = piece.find(b"\0")
    if nul >= 0:
        raise UnusableSource(f"binary file (byte {position + nul} is 0)", "name text files, or arrays as .npy or .bin")
    try:
        piece.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text (byte {position + error.start} is 0x{piece[error.start]:02x})"
        raise UnusableSource(what, "convert it to UTF-8, with iconv for example") from error


def _array_documents(source: Source, max_tokens: int, separator: int | None, id_limit: int) -> Iterator[Document]:
    for run in _runs(_open_array(source)):
        first = 0
        for end in _ends(run, separator, id_limit):
            for start in range(first, end, max_tokens):
                yield np.ascontiguousarray(run[start : min(end, start + max_tokens)], dtype="<u2")
            first = end + 1


def _ends(run: Document, separator: int | None, id_limit: int) -> Iterator[int]:
    for start in range(0, len(run), _BLOCK_BYTES):
        block = run[start : start + _BLOCK_BYTES]
        _require_ids(block, start, id_limit)
        if separator is not None:
            yield from (np.flatnonzero(block == separator) + start).tolist()
    yield len(run)


def _runs(ids: Document) -> Iterator[Document]:
    if ids.ndim == 1:
        yield ids
    else:
        yield from ids


def _open_array(source: Source) -> Document:
    if not source.size_bytes:
        return np.empty(0, dtype="<u2")
    if source.path.suffix.lower() == ".bin":
        if source.size_bytes % 2:
            what = f"not an array of uint16 ids (odd size, {source.size_bytes} bytes)"
            raise UnusableSource(what, "write the ids as little-endian uint16, or as .npy")
        return np.memmap(source.path, dtype="<u2", mode="r")
    try:
        ids: Document = np.lib.format.open_memmap(source.path, mode="r")
    except (ValueError, EOFError) as error:
        what = f"not a .npy array ({' '.join(str(error).split())})"
        raise UnusableSource(what, "write it with numpy.save, as integers") from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        what = f"not token ids ({ids.ndim} dimensions of {ids.dtype})"
        raise UnusableSource(what, "save integers of one dimension, or one row for each document")
    return ids


def _require_ids(ids: Document, position: int, id_limit: int) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= id_limit))
    if wrong.size:
        what = f"token id {ids[wrong[0]]} at position {position + wrong[0]} is not in 0 … {id_limit - 1}"
        raise UnusableSource(what, "encode with a smaller vocabulary, or give a larger --vocab-size")
