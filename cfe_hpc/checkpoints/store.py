"""Saving and finding checkpoints, all ranks together.

A save is a draft folder, a data file and an index from each rank, a manifest from rank 0, and a rename. Whatever
fails, on whichever rank, fails on all of them with one message; older checkpoints stay untouched.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank, reason
from cfe_hpc.checkpoints.checksum import crc32c
from cfe_hpc.checkpoints.layout import place
from cfe_hpc.checkpoints.manifest import (
    MANIFEST,
    FileFacts,
    Identity,
    Manifest,
    ShardIndex,
    data_name,
    index_name,
)
from cfe_hpc.checkpoints.protocols import Fault, Group, Piece
from cfe_hpc.checkpoints.reader import Opened, parse_manifest, read_manifest_bytes
from cfe_hpc.checkpoints.shard import data_facts, header, write_data, write_file
from cfe_hpc.checkpoints.staging import Source
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint
from cfe_hpc.files import fsync_dir
from cfe_hpc.runfolder import utc_now
from cfe_hpc.units import format_size

__all__ = ["CheckpointInfo", "Content", "Report", "newest", "save"]

Report = Callable[[Path, str], None]
"""Called on rank 0 with the folder of a checkpoint that cannot be used, and why, in one line."""

_MARGIN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What one rank puts into a checkpoint.

    Attributes:
        pieces: of tensors that belong to the checkpoint as a whole. Pieces of several ranks may overlap or be the
            same; together they must cover each tensor.
        own: whole tensors of this rank alone; their names are this rank's own as well.
        state: JSON tree.
        layout: facts that must agree between checkpoint and job, JSON; rank 0's are stored.
    """

    pieces: Sequence[Piece] = ()
    own: Sequence[Piece] = ()
    state: Any = None
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        size_bytes: of all ranks' files.
        seconds: from the call of `save` to its return on this rank.
    """

    path: Path
    step: int
    size_bytes: int
    seconds: float


def save(
    root: Path,
    content: Content,
    *,
    step: int,
    attempt: int,
    run_id: str,
    group: Group,
    metrics: Mapping[str, float] | None = None,
    on_fault: Fault | None = None,
) -> CheckpointInfo:
    """Write a checkpoint; it is durable and committed on return. Collective.

    Args:
        root: the checkpoints folder; made when missing.
        metrics: logged values at this step, rank 0's; rotation picks the best by them.
        on_fault: called with the name of each moment of the save, for tests that die there.

    Raises:
        CheckpointError: nothing was committed; the same message on every rank. The draft is removed as far as the
            filesystem lets it; older checkpoints, one of the same step included, are as they were.
    """
    started = monotonic()
    moment = on_fault or _ignore
    source_bytes = [int(size) for size in all_ranks(group, lambda: str(_size_bytes(content)).encode())]
    token = first_rank(group, lambda: _make_draft(root, step, attempt, sum(source_bytes))).decode()
    draft = root / folders.draft_name(step, attempt, token)
    identity = Identity(run_id=run_id, step=step, attempt=attempt, world_size=group.size, token=token)
    moment("draft-made")
    try:
        facts = all_ranks(group, lambda: _write_shard(draft, identity, group.rank, content, moment))
        manifest = Manifest(
            identity=identity,
            time=utc_now(),
            layout=content.layout,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            files=_files(facts),
        )
        first_rank(group, lambda: _commit(root, draft, manifest, moment))
    except CheckpointError:
        if group.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    moment("committed")
    return CheckpointInfo(
        path=root / folders.step_name(step),
        step=step,
        size_bytes=manifest.size_bytes,
        seconds=monotonic() - started,
    )


def _ignore(moment: str) -> None:
    del moment


def _size_bytes(content: Content) -> int:
    return place([*content.pieces, *content.own]).size_bytes + len(json.dumps(content.state, allow_nan=False))


def _make_draft(root: Path, step: int, attempt: int, needed_bytes: int) -> bytes:
    root.mkdir(parents=True, exist_ok=True)
    space = os.statvfs(root)
    free_bytes = space.f_bavail * space.f_frsize
    if needed_bytes + _MARGIN_BYTES > free_bytes:
        raise CheckpointError(
            f"{folders.step_name(step)}: No space left on device: the checkpoint takes {format_size(needed_bytes)} "
            f"and {format_size(free_bytes)} are free in {root}"
        )
    token = secrets.token_hex(4)
    (root / folders.draft_name(step, attempt, token)).mkdir()
    return token.encode()


def _write_shard(draft: Path, identity: Identity, rank: int, content: Content, moment: Fault) -> bytes:
    pieces = [*content.pieces, *content.own]
    placement = place(pieces)
    source = Source(header(identity, rank), placement, [piece.data for piece in pieces])
    chunks = write_data(draft / data_name(rank), source)
    moment("data-written")
    index = ShardIndex(
        identity=identity,
        rank=rank,
        data_bytes=placement.size_bytes,
        chunks=chunks,
        shared=placement.extents[: len(content.pieces)],
        own=placement.extents[len(content.pieces) :],
        state=content.state,
    ).seal()
    write_file(draft / index_name(rank), index)
    moment("index-written")
    data = data_facts(placement.size_bytes, chunks)
    return json.dumps([data.size_bytes, data.crc32c, len(index), crc32c(index)]).encode()


def _files(facts: Sequence[bytes]) -> dict[str, FileFacts]:
    files = {}
    for rank, packed in enumerate(facts):
        data_bytes, data_sum, index_bytes, index_sum = json.loads(packed)
        files[data_name(rank)] = FileFacts(size_bytes=data_bytes, crc32c=data_sum)
        files[index_name(rank)] = FileFacts(size_bytes=index_bytes, crc32c=index_sum)
    return files


def _commit(root: Path, draft: Path, manifest: Manifest, moment: Fault) -> bytes:
    Opened(draft, manifest)  # every index is there, and no tensor has a gap
    write_file(draft / MANIFEST, manifest.seal())
    fsync_dir(draft)
    moment("manifest-written")
    folders.put_in_place(draft, root / folders.step_name(manifest.identity.step))
    return b""


def newest(root: Path, *, run_id: str, attempt: int, group: Group, report: Report | None = None) -> Opened | None:
    """The newest checkpoint that verifies in full, chosen by rank 0 and checked by all ranks. Collective.

    Rank 0 first settles what attempts before `attempt` left: drafts that lack nothing but their name are put in
    place, other drafts are deleted. Checkpoints that cannot be used stay where they are.

    Args:
        report: called on rank 0 for each newer one that cannot be used.

    Returns:
        The same checkpoint on every rank; None when nothing was ever committed.

    Raises:
        CorruptCheckpoint: there are checkpoints, and none of them can be used; on every rank.
        CheckpointError: the folder cannot be listed; on every rank.
    """
    why = ""
    steps = json.loads(first_rank(group, lambda: _list(root, attempt)))
    for step in steps:
        folder = root / folders.step_name(step)
        try:
            return _open_together(folder, run_id, group)
        except CorruptCheckpoint as error:
            why = why or f"{folder.name}: {reason(error)}"
            if group.rank == 0 and report is not None:
                report(folder, reason(error))
    if why:
        raise CorruptCheckpoint(f"none of {len(steps)} checkpoints in {root} can be used; the newest, {why}")
    return None


def _list(root: Path, attempt: int) -> bytes:
    folders.sweep_drafts(root, attempt)
    return json.dumps([step for step, _ in folders.committed(root)]).encode()


def _open_together(folder: Path, run_id: str, group: Group) -> Opened:
    def read() -> bytes:
        content = read_manifest_bytes(folder)
        parse_manifest(content, folder.name, run_id)
        return content

    manifest = parse_manifest(first_rank(group, read), folder.name, run_id)
    opened: list[Opened] = []

    def check() -> bytes:
        opened.append(Opened(folder, manifest))
        opened[0].verify(group.rank, group.size)
        return b""

    all_ranks(group, check)
    return opened[0]
