"""The steps of a save, whoever takes them: the ranks themselves, or writer processes beside them.

A draft folder, a data file and an index from each rank, then a manifest and a rename. Nothing here is collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.io.shard import NewFile, data_facts, write_file
from cfe_hpc.checkpoints.io.staging import Chunks
from cfe_hpc.checkpoints.layout import Placement
from cfe_hpc.checkpoints.manifest import (
    MANIFEST,
    FileFacts,
    Identity,
    Manifest,
    ShardIndex,
    data_name,
    index_name,
)
from cfe_hpc.checkpoints.protocols import Fault
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.errors import CorruptCheckpoint, DiskFull
from cfe_hpc.files import fsync_dir
from cfe_hpc.units import format_size

__all__ = [
    "claim",
    "commit",
    "enter",
    "extents_digest",
    "files",
    "ignore",
    "make_draft",
    "new_token",
    "seal_shard",
    "unwritten_index",
    "write_shard",
]

_MARGIN_BYTES = 1 << 20


def ignore(moment: str) -> None:
    """The Fault that does nothing."""
    del moment


def new_token() -> str:
    """A save's token."""
    return secrets.token_hex(4)


def make_draft(root: Path, step: int, attempt: int, needed_bytes: int) -> bytes:
    """Make the draft folder of a save with a new token, which is returned; raises as `claim`."""
    token = new_token()
    claim(root / folders.draft_name(step, attempt, token), needed_bytes)
    return token.encode()


def claim(draft: Path, needed_bytes: int) -> None:
    """Make a draft folder, unless another rank has, and the checkpoints folder when that is missing.

    Raises:
        DiskFull: fewer than `needed_bytes` are free.
        OSError: the folder cannot be made.
    """
    root = draft.parent
    root.mkdir(exist_ok=True)  # not its parents: a filesystem that has gone must not be mistaken for an empty one
    space = os.statvfs(root)
    free_bytes = space.f_bavail * space.f_frsize
    # Some filesystems do not know their size (ramfs, FUSE): they say that they have no blocks at all.
    if space.f_blocks and needed_bytes + _MARGIN_BYTES > free_bytes:
        raise DiskFull(
            f"{draft.name.partition('.')[0]}: No space left on device: the checkpoint takes "
            f"{format_size(needed_bytes)} and {format_size(free_bytes)} are free in {root}"
        )
    draft.mkdir(exist_ok=True)


def enter(draft: Path, rank: int, needed_bytes: int) -> None:
    """Have the draft folder of a save, as any rank's helper: whichever comes first makes it. Raises as `claim`.

    Args:
        needed_bytes: rank 0 alone looks whether they are free.
    """
    if rank == 0:
        claim(draft, needed_bytes)
    else:
        draft.parent.mkdir(exist_ok=True)  # not what lies above it: see `claim`
        draft.mkdir(exist_ok=True)


def unwritten_index(
    identity: Identity, rank: int, placement: Placement, *, num_shared: int, state: object
) -> ShardIndex:
    """The index of a data file that is still to be written: it lacks the chunks' checksums.

    Args:
        num_shared: extents, from the first on, of tensors that belong to the checkpoint as a whole.
    """
    return ShardIndex(
        identity=identity,
        rank=rank,
        data_bytes=placement.size_bytes,
        chunks=(),
        shared=placement.extents[:num_shared],
        own=placement.extents[num_shared:],
        state=state,
    )


def write_shard(draft: Path, index: ShardIndex, source: Chunks, moment: Fault = ignore) -> bytes:
    """Write one rank's data file and its index, both durable on return; what `files` needs to know of them.

    Args:
        index: an `unwritten_index`.

    Raises:
        OSError: naming the file.
    """
    file = NewFile(draft / data_name(index.rank), source.size_bytes)
    return seal_shard(draft, index, file, file.write(source), moment)


def seal_shard(draft: Path, index: ShardIndex, file: NewFile, chunks: tuple[int, ...], moment: Fault = ignore) -> bytes:
    """`write_shard` of a data file that is written, but for its sync: `chunks` is what NewFile.write returned."""
    try:
        moment("data-written")
        sealed = replace(index, chunks=chunks).seal()
        # Before the sync of the data: one commit of a filesystem's journal then serves both files.
        write_file(draft / index_name(index.rank), sealed)
    except BaseException:
        file.close()
        raise
    file.sync()
    moment("index-written")
    data = data_facts(index.data_bytes, chunks)
    return json.dumps([data.size_bytes, data.crc32c, len(sealed), crc32c(sealed)]).encode()


def files(facts: Sequence[bytes]) -> dict[str, FileFacts]:
    """The manifest's list of files: `facts` is what `write_shard` returned, by rank."""
    found = {}
    for rank, packed in enumerate(facts):
        data_bytes, data_sum, index_bytes, index_sum = json.loads(packed)
        found[data_name(rank)] = FileFacts(size_bytes=data_bytes, crc32c=data_sum)
        found[index_name(rank)] = FileFacts(size_bytes=index_bytes, crc32c=index_sum)
    return found


def commit(root: Path, draft: Path, manifest: Manifest, moment: Fault = ignore, *, fits: bool = False) -> bytes:
    """Make a draft with all its shards count: manifest, fsync, rename; durable on return.

    Args:
        fits: its shards have the same extents as those of a checkpoint that was committed: the indexes are not read.

    Returns:
        Nothing, as bytes: what agree's functions take.

    Raises:
        CorruptCheckpoint: a shard is missing, or a tensor has a gap.
        OSError: the draft is still a draft.
    """
    if fits:
        _refuse_missing(draft, manifest)
    else:
        Opened(draft, manifest)  # every index is there, and no tensor has a gap
    write_file(draft / MANIFEST, manifest.seal())
    fsync_dir(draft)
    moment("manifest-written")
    folders.put_in_place(draft, root / folders.step_name(manifest.identity.step))
    return b""


def _refuse_missing(draft: Path, manifest: Manifest) -> None:
    missing = sorted(manifest.files.keys() - set(os.listdir(draft)))
    if missing:
        raise CorruptCheckpoint(f"{missing[0]} is missing")


def extents_digest(index: ShardIndex) -> str:
    """The same for two shards whose extents are the same, and for no others."""
    return hashlib.sha256(repr((index.data_bytes, index.shared, index.own)).encode()).hexdigest()
