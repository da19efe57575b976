"""crc32c of bytes, and JSON files that carry their own crc32c in their last line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cfe_hpc.errors import CheckpointError, CorruptCheckpoint

__all__ = ["crc32c", "crc32c_of", "seal", "unseal"]

_TAIL_BYTES = len(b'"crc32c": "00000000"\n}\n')


def crc32c(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """The CRC-32C (Castagnoli) of `data`, continued from `seed`, at about the speed of memory.

    Raises:
        CheckpointError: the awscrt package is not installed.
    """
    return crc32c_of([data], seed)


def crc32c_of(parts: Iterable[bytes | bytearray | memoryview], seed: int = 0) -> int:
    """The same of all parts together, in their order: for thousands of small ones. Raises as `crc32c`."""
    try:
        from awscrt.checksums import crc32c as compute
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "checkpoints are checked with the awscrt package, which is not installed; "
            "pip install awscrt (it is part of cfe-hpc[train])"
        ) from error
    for part in parts:
        seed = compute(part, seed)
    return seed


def _tail(head: bytes) -> bytes:
    return f'"crc32c": "{crc32c(head):08x}"\n}}\n'.encode()


def seal(fields: Mapping[str, Any]) -> bytes:
    """`fields` as a JSON object, one key a line, ending in its own checksum over all bytes before that key.

    Raises:
        ValueError, TypeError: a value is not JSON (not-a-number included).
    """
    lines = (
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'), allow_nan=False)},\n"
        for key, value in fields.items()
    )
    head = ("{\n" + "".join(lines)).encode()
    return head + _tail(head)


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The fields of a sealed file, its checksum taken off.

    Args:
        name: the file's name, for messages.

    Raises:
        CorruptCheckpoint: the file is empty, cut short, or differs in any bit from what was sealed.
    """
    if not data:
        raise CorruptCheckpoint(f"{name} is empty")
    head, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    if tail != _tail(head):
        raise CorruptCheckpoint(f"{name} is torn or altered: it does not match its own checksum")
    fields: dict[str, Any] = json.loads(data)
    del fields["crc32c"]
    return fields
