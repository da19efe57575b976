"""Saving and finding checkpoints, all ranks together.

A save is a draft folder, a data file and an index from each rank, a manifest from rank 0, and a rename. Whatever
fails, on whichever rank, fails on all of them with one message; older checkpoints stay untouched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank, reason
from cfe_hpc.checkpoints.io.shard import header
from cfe_hpc.checkpoints.io.shard_reader import read_index
from cfe_hpc.checkpoints.io.staging import Source
from cfe_hpc.checkpoints.layout import place
from cfe_hpc.checkpoints.manifest import Identity, Manifest
from cfe_hpc.checkpoints.protocols import Fault, Group, Piece
from cfe_hpc.checkpoints.reader import Opened, parse_manifest, read_manifest_bytes
from cfe_hpc.checkpoints.state.uncollected import uncollected
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint
from cfe_hpc.runfolder import utc_now

__all__ = ["CheckpointInfo", "Content", "Places", "Report", "newest", "resume", "save"]

Report = Callable[[Path, str], None]
"""Called on rank 0 with the folder of a checkpoint that cannot be used, and why, in one line."""

Places = Callable[[Path, Identity, int], Sequence[Path]]
"""Called with a checkpoint's folder and identity and a rank: folders that have that rank's shard, the nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What one rank puts into a checkpoint.

    Attributes:
        pieces: of tensors that belong to the checkpoint as a whole. Pieces of several ranks may overlap or be the
            same; together they must cover each tensor.
        own: whole tensors of this rank alone; their names are this rank's own as well.
        state: JSON tree.
        layout: facts that must agree between checkpoint and job, JSON; rank 0's are stored.
        unchanged: tells whether the steady pieces of torch tensors are as they were when this was made, as far as
            torch counts writes: not those of another library, or through `.data`.
        form: the same object in contents of this rank that are alike but for bytes, `state` and `layout`; None for
            one that has no like.
        holds: keeps the memory of pieces where they do not.
        awaited: every rank has said that it is ready for contents of their forms; the same on all of them.
    """

    pieces: Sequence[Piece] = ()
    own: Sequence[Piece] = ()
    state: Any = None
    layout: dict[str, Any] = field(default_factory=dict)
    unchanged: Callable[[], bool] = lambda: True
    form: object = None
    holds: object = None
    awaited: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        size_bytes: of all ranks' files.
        seconds: from the call that began the save until it was durable and committed.
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
    moment = on_fault or drafts.ignore
    source_bytes = [int(size) for size in all_ranks(group, lambda: str(_size_bytes(content)).encode())]
    token = first_rank(group, lambda: drafts.make_draft(root, step, attempt, sum(source_bytes))).decode()
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
            files=drafts.files(facts),
        )
        first_rank(group, lambda: drafts.commit(root, draft, manifest, moment))
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


def _size_bytes(content: Content) -> int:
    """Bytes that a rank's part takes on disk, nearly: its data file and its state.

    Raises:
        CheckpointError: a piece does not fit its dtype and shape.
    """
    return place([*content.pieces, *content.own]).size_bytes + len(json.dumps(content.state, allow_nan=False))


def _write_shard(draft: Path, identity: Identity, rank: int, content: Content, moment: Fault) -> bytes:
    pieces = [*content.pieces, *content.own]
    placement = place(pieces)
    source = Source(header(identity, rank), placement, [piece.data for piece in pieces])
    index = drafts.unwritten_index(identity, rank, placement, num_shared=len(content.pieces), state=content.state)
    return drafts.write_shard(draft, index, source, moment)


@uncollected()
def resume(
    root: Path,
    load: Callable[[Opened], None],
    *,
    run_id: str,
    attempt: int,
    group: Group,
    report: Report | None = None,
    places: Places | None = None,
    elsewhere: Iterable[int] = (),
    below: int | None = None,
) -> Opened | None:
    """Load the newest checkpoint that can be used, chosen by rank 0. Collective.

    Rank 0 first settles what attempts before `attempt` left: drafts that lack nothing but their name are put in
    place, other drafts are deleted. Checkpoints that cannot be used stay where they are.

    Args:
        load: reads what it needs, each byte once, checked on its way; collective. When it raises CorruptCheckpoint,
            on all ranks, the next older checkpoint is tried: it must put back all that it may have changed.
        report: called on rank 0 for each newer one that cannot be used.
        places: where else this rank finds shards; the folder itself alone when left out.
        elsewhere: steps of further checkpoints, the same on every rank: each is in the folder once it is asked for,
            and none is asked for before all that were there have turned out to be of no use; collective.
        below: only checkpoints of fewer steps count; all when left out.

    Returns:
        The same checkpoint on every rank; None when no such one was ever committed.

    Raises:
        CorruptCheckpoint: there are checkpoints, and none of them can be used; on every rank.
        CheckpointError: the folder cannot be listed; on every rank.
    """
    why = ""
    steps = json.loads(first_rank(group, lambda: _list(root, attempt)))
    steps = [step for step in steps if below is None or step < below]
    for step in chain(steps, elsewhere if steps else ()):
        folder = root / folders.step_name(step)
        try:
            opened = _open_together(folder, run_id, group, places)
            load(opened)
            return opened
        except CorruptCheckpoint as error:
            why = why or f"{folder.name}: {reason(error)}"
            if group.rank == 0 and report is not None:
                report(folder, reason(error))
    if why:
        raise CorruptCheckpoint(f"none of {len(steps)} checkpoints in {root} can be used; the newest, {why}")
    return None


def newest(root: Path, *, run_id: str, attempt: int, group: Group, report: Report | None = None) -> Opened | None:
    """The newest checkpoint that verifies in full, each rank reading a part of it. Collective; see `resume`."""

    def verify(opened: Opened) -> None:
        all_ranks(group, lambda: _done(opened.verify))

    return resume(root, verify, run_id=run_id, attempt=attempt, group=group, report=report)


def _done(act: Callable[[], None]) -> bytes:
    act()
    return b""


def _list(root: Path, attempt: int) -> bytes:
    folders.sweep_drafts(root, attempt)
    return json.dumps([step for step, _ in folders.committed(root)]).encode()


def _open_together(folder: Path, run_id: str, group: Group, places: Places | None) -> Opened:
    """Each index file is read by one rank, for all; each data file's header by another."""

    def read() -> bytes:
        content = read_manifest_bytes(folder)
        parse_manifest(content, folder.name, run_id)
        return content

    manifest = parse_manifest(first_rank(group, read), folder.name, run_id)
    ranks = range(manifest.identity.world_size)
    mine = ranks[group.rank :: group.size]
    shares = all_ranks(group, lambda: _pack([read_index(folder, rank) for rank in mine]))
    indexes = [b""] * len(ranks)
    for part, share in enumerate(shares):
        indexes[part :: group.size] = _unpack(share)
    opened: list[Opened] = []
    near = None if places is None else partial(places, folder, manifest.identity)

    def check() -> bytes:
        opened.append(Opened(folder, manifest, indexes=indexes, places=near, part=group.rank, parts=group.size))
        opened[0].check_headers()
        return b""

    all_ranks(group, check)
    return opened[0]


def _pack(contents: Sequence[bytes]) -> bytes:
    return b"".join(len(content).to_bytes(8, "little") + content for content in contents)


def _unpack(packed: bytes) -> list[bytes]:
    contents, at = [], 0
    while at < len(packed):
        end = at + 8 + int.from_bytes(packed[at : at + 8], "little")
        contents.append(packed[at + 8 : end])
        at = end
    return contents
