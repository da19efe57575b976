"""Consolidated tensors of a checkpoint as one safetensors file. No torch, no numpy, no safetensors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from cfe_hpc.checkpoints.layout import CHUNK_BYTES, DTYPE_BYTES
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.errors import CheckpointError
from cfe_hpc.files import fsync_dir

__all__ = ["export_safetensors"]

_WORDS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}


def export_safetensors(opened: Opened, names: Sequence[str], path: Path) -> int:
    """Write whole tensors, whichever ranks hold them, to `path`; every byte is checked on its way.

    Returns:
        The file's size in bytes.

    Raises:
        CheckpointError: a tensor's dtype has no word in safetensors.
        CorruptCheckpoint: bytes are not those that were written.
        OSError: `path` cannot be written. It is then, as in the cases above, as it was.
    """
    head = _head(opened, names)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(aside, "xb") as stream:
            stream.write(head)
            for name in names:
                _copy(opened, name, stream)
            stream.flush()
            os.fsync(stream.fileno())
            size_bytes = stream.tell()
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    fsync_dir(path.parent)
    return size_bytes


def _head(opened: Opened, names: Sequence[str]) -> bytes:
    identity = opened.manifest.identity
    entries: dict[str, object] = {
        "__metadata__": {"run_id": identity.run_id, "step": str(identity.step), "attempt": str(identity.attempt)}
    }
    at = 0
    for name in names:
        dtype, shape = opened.reader.describe(name)
        if dtype not in _WORDS:
            raise CheckpointError(f"tensor {name}: safetensors has no word for {dtype}; leave it out with --only")
        end = at + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": _WORDS[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(opened: Opened, name: str, stream: BinaryIO) -> None:
    dtype, shape = opened.reader.describe(name)
    total, step = math.prod(shape), CHUNK_BYTES // DTYPE_BYTES[dtype]
    buffer = memoryview(bytearray(min(total, step) * DTYPE_BYTES[dtype]))
    for start in range(0, total, step):
        part = buffer[: min(step, total - start) * DTYPE_BYTES[dtype]]
        opened.reader.read_into(name, start, part)
        stream.write(part)
