"""Layout of a token file, version 1, and the one way to open it.

    /                       attributes: format, format_version, dtype, vocab_size, separator (-1: none),
                            validation_fraction; strings have a fixed length
    /train, /validation     attributes: tokens, documents, tokens_sha256
    /<split>/tokens         uint8 or little-endian uint16, chunks of 1 MiB, Fletcher-32, not compressed
    /<split>/documents      uint64: where each document starts, and at last the number of tokens; Fletcher-32
    /<split>/sources        uint32: for each document, its line in /sources; Fletcher-32
    /sources                UTF-8 bytes, one JSON object a line: name, bytes, sha256, documents; Fletcher-32

Chunks are stored as they are (the checksum follows the data), so that a window can be read with one positional
read at a known place of the file. The file is written with the HDF5 1.10 layout, whose headers and chunk indexes
carry checksums of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from cfe_hpc.errors import DataError

__all__ = [
    "CHUNK_BYTES",
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "LIBVER",
    "READ_ERRORS",
    "SPLITS",
    "SplitFacts",
    "TokenFileFacts",
    "open_token_file",
    "read_facts",
]

FORMAT = "cfe_hpc tokens"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
DTYPES: Mapping[str, str] = {"uint8": "|u1", "uint16": "<u2"}
CHUNK_BYTES = 1 << 20
LIBVER = ("v110", "v110")
# What h5py raises, by the part that is damaged, and what decoding a damaged value raises.
READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
_REBUILD = "build it again with `cfe-hpc data build`"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts:
    """What one split holds; `tokens_sha256` is over its tokens' little-endian bytes."""

    tokens: int
    documents: int
    tokens_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFileFacts:
    """What the header of a token file states.

    Attributes:
        dtype: "uint8" or "uint16".
        vocab_size: every token is below it.
        separator: the token that ends each document; None when documents are not separated.
        validation_fraction: the share of documents asked for when the file was built.
        splits: facts of "train" and "validation".
    """

    dtype: str
    vocab_size: int
    separator: int | None
    validation_fraction: float
    splits: Mapping[str, SplitFacts]


def open_token_file(path: Path) -> Any:
    """An h5py.File of a token file, open for reading. No HDF5 lock is taken: Lustre and NFS mounts without
    flock refuse it, and a finished token file never changes.

    Raises:
        DataError: missing, unreadable, truncated, not HDF5, or not a token file of this version.
    """
    try:
        with open(path, "rb"):
            pass
        file = _open(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such token file; build it with `cfe-hpc data build`") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder; name a token file") from error
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its rights") from error
    except OSError as error:
        reason = _reason(error)
        raise DataError(f"{path}: not a whole HDF5 file ({reason}); {_REBUILD}") from error
    try:
        _require_version(path, file)
    except BaseException:
        file.close()
        raise
    return file


def _open(path: Path) -> Any:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        # The user's own code has this file open in this process, with locks: HDF5 wants the same again.
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")


def _require_version(path: Path, file: Any) -> None:
    try:
        kind, version = file.attrs.get("format"), file.attrs.get("format_version")
    except READ_ERRORS as error:
        raise DataError(f"{path}: header is damaged ({_reason(error)}); {_REBUILD}") from error
    if kind != FORMAT.encode():
        raise DataError(f"{path}: an HDF5 file, but not a token file of cfe_hpc; {_REBUILD}")
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: token format version {version}, this cfe_hpc reads {FORMAT_VERSION}; {_REBUILD}")


def read_facts(path: Path, file: Any) -> TokenFileFacts:
    """The header of an open token file, its layout verified.

    Raises:
        DataError: a part is missing, damaged, or laid out otherwise.
    """
    try:
        dtype = _text(file.attrs["dtype"])
        separator = int(file.attrs["separator"])
        splits = {}
        for split in SPLITS:
            tokens, attrs = file[split]["tokens"], file[split].attrs
            facts = SplitFacts(
                tokens=int(attrs["tokens"]),
                documents=int(attrs["documents"]),
                tokens_sha256=_text(attrs["tokens_sha256"]),
            )
            plain = tokens.fletcher32 and tokens.chunks and not (tokens.compression or tokens.shuffle)
            if tokens.shape != (facts.tokens,) or tokens.dtype.str != DTYPES[dtype] or not plain:
                raise DataError(f"{path}: {split}/tokens is not laid out as the header states; {_REBUILD}")
            splits[split] = facts
        return TokenFileFacts(
            dtype=dtype,
            vocab_size=int(file.attrs["vocab_size"]),
            separator=None if separator < 0 else separator,
            validation_fraction=float(file.attrs["validation_fraction"]),
            splits=splits,
        )
    except READ_ERRORS as error:
        raise DataError(f"{path}: header is damaged ({_reason(error)}); {_REBUILD}") from error


def _text(value: bytes) -> str:
    return value.decode("ascii")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())
