"""The two JSON files of a checkpoint: each rank's index of its data file, and the manifest that makes it count.

docs/checkpoint-format.md describes both to readers in other languages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cfe_hpc.checkpoints.checksum import seal, unseal
from cfe_hpc.checkpoints.layout import DTYPE_BYTES, Extent
from cfe_hpc.errors import CorruptCheckpoint

__all__ = ["MANIFEST", "VERSION", "FileFacts", "Identity", "Manifest", "ShardIndex", "data_name", "index_name"]

MANIFEST = "manifest.json"
VERSION = 1
_MANIFEST_FORMAT = "cfe_hpc checkpoint manifest"
_INDEX_FORMAT = "cfe_hpc checkpoint shard"


def data_name(rank: int) -> str:
    """The name of a rank's data file."""
    return f"shard-{rank:05d}.bin"


def index_name(rank: int) -> str:
    """The name of a rank's index file."""
    return f"shard-{rank:05d}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose save a file belongs to; written in every file, so that none can stand in for another's.

    Attributes:
        token: random, one for each save: tells two saves of one step by one attempt apart.
    """

    run_id: str
    step: int
    attempt: int
    world_size: int
    token: str

    def difference(self, other: Identity) -> str | None:
        """What `other` belongs to instead, in words; None when it is the same save."""
        for field, words in (("run_id", "run"), ("step", "step"), ("attempt", "attempt"), ("world_size", "world size")):
            mine, its = getattr(self, field), getattr(other, field)
            if mine != its:
                return f"belongs to {words} {its}, not {mine}"
        return None if self.token == other.token else "belongs to another save of the same step"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """A file as the manifest knows it.

    Attributes:
        crc32c: of an index file, over its bytes; of a data file, over its chunks' checksums as little-endian
            32-bit words.
    """

    size_bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What one rank saved, and where in its data file.

    Attributes:
        chunks: crc32c of each chunk of the data file, in order.
        shared: extents of tensors that belong to the checkpoint as a whole; other shards may hold the rest.
        own: whole tensors of this rank alone.
        state: the rank's tree, JSON (see checkpoints.codec); it names tensors of `shared` and `own`.
    """

    identity: Identity
    rank: int
    data_bytes: int
    chunks: tuple[int, ...]
    shared: tuple[Extent, ...]
    own: tuple[Extent, ...]
    state: Any

    def seal(self) -> bytes:
        """The index file's bytes."""
        return seal(
            {
                "format": _INDEX_FORMAT,
                "version": VERSION,
                **asdict(self.identity),
                "rank": self.rank,
                "data_bytes": self.data_bytes,
                "chunks": [f"{value:08x}" for value in self.chunks],
                "shared": [_fields_of(extent) for extent in self.shared],
                "own": [_fields_of(extent) for extent in self.own],
                "state": self.state,
            }
        )

    @classmethod
    def unseal(cls, data: bytes, name: str) -> ShardIndex:
        """The index of a file's bytes. Raises CorruptCheckpoint, naming the file."""
        fields = _fields(data, name, _INDEX_FORMAT)
        try:
            return cls(
                identity=_identity(fields),
                rank=fields["rank"],
                data_bytes=fields["data_bytes"],
                chunks=tuple(int(value, 16) for value in fields["chunks"]),
                shared=tuple(_extent(entry) for entry in fields["shared"]),
                own=tuple(_extent(entry) for entry in fields["own"]),
                state=fields["state"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpoint(f"{name} is no shard index: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of. Written last: a folder without one that verifies is no checkpoint.

    Attributes:
        time: when it was committed, RFC 3339.
        layout: facts that must agree between checkpoint and job, JSON.
        metrics: logged values at that step; may hold NaN.
        files: every other file of the checkpoint, by name.
    """

    identity: Identity
    time: str
    layout: dict[str, Any]
    metrics: dict[str, float]
    files: dict[str, FileFacts]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(facts.size_bytes for facts in self.files.values())

    def seal(self) -> bytes:
        """The manifest file's bytes."""
        return seal(
            {
                "format": _MANIFEST_FORMAT,
                "version": VERSION,
                **asdict(self.identity),
                "time": self.time,
                "layout": self.layout,
                "metrics": {
                    name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()
                },
                "files": {
                    name: {"size_bytes": facts.size_bytes, "crc32c": f"{facts.crc32c:08x}"}
                    for name, facts in self.files.items()
                },
            }
        )

    @classmethod
    def unseal(cls, data: bytes) -> Manifest:
        """The manifest of a file's bytes. Raises CorruptCheckpoint."""
        fields = _fields(data, MANIFEST, _MANIFEST_FORMAT)
        try:
            return cls(
                identity=_identity(fields),
                time=fields["time"],
                layout=fields["layout"],
                metrics={name: float(value) for name, value in fields["metrics"].items()},
                files={
                    name: FileFacts(size_bytes=entry["size_bytes"], crc32c=int(entry["crc32c"], 16))
                    for name, entry in fields["files"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(f"{MANIFEST} is no manifest: {error!r}") from error


def _fields(data: bytes, name: str, wanted: str) -> dict[str, Any]:
    fields = unseal(data, name)
    if fields.get("format") != wanted:
        raise CorruptCheckpoint(f"{name} is no {wanted}")
    if fields.get("version") != VERSION:
        raise CorruptCheckpoint(
            f"{name} has version {fields.get('version')} of the format; this cfe_hpc reads version {VERSION}"
        )
    return fields


def _identity(fields: Mapping[str, Any]) -> Identity:
    return Identity(
        run_id=fields["run_id"],
        step=fields["step"],
        attempt=fields["attempt"],
        world_size=fields["world_size"],
        token=fields["token"],
    )


def _extent(entry: Mapping[str, Any]) -> Extent:
    if entry["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    return Extent(
        name=entry["name"],
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        start=entry["start"],
        count=entry["count"],
        offset=entry["offset"],
    )


def _fields_of(extent: Extent) -> dict[str, Any]:
    """Every field, in order. (dataclasses.asdict copies deeply: a hundred times slower, while training waits.)"""
    return {
        "name": extent.name,
        "dtype": extent.dtype,
        "shape": extent.shape,
        "start": extent.start,
        "count": extent.count,
        "offset": extent.offset,
    }
