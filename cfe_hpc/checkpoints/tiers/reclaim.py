"""Bringing home what lies elsewhere: on nodes in full, or on the remote, and not on the shared filesystem.

Done before an attempt loads anything, by all ranks together. Whichever node is lost, its shards lie on its partner
too; a copy that turns out bad is replaced by another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.agree import all_ranks, first_rank, reason
from cfe_hpc.checkpoints.keeping.rotation import inventory
from cfe_hpc.checkpoints.manifest import MANIFEST, Manifest, data_name
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.store import Report
from cfe_hpc.checkpoints.tiers import nodelocal
from cfe_hpc.checkpoints.tiers.places import NodeTier
from cfe_hpc.checkpoints.tiers.remote import Remote
from cfe_hpc.checkpoints.tiers.transfer import copy_shard
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint

__all__ = ["Found", "at_remote", "fetch", "on_nodes", "reclaim", "tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copies:
    """What all nodes hold of one save.

    Attributes:
        source: a rank whose node has the manifest.
        holders: for each shard, a rank of each node that has it; at least one.
    """

    name: str
    source: int
    holders: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint that lies elsewhere; whether it verifies turns out when it is brought.

    Attributes:
        where: in words.
        bring: commits it on the shared filesystem, in place of what has its step there. Collective; raises
            CorruptCheckpoint when it does not verify, and CheckpointError when it cannot be brought, on every rank.
    """

    step: int
    where: str
    bring: Callable[[], None]


def on_nodes(
    root: Path, tier: NodeTier, *, run_id: str, attempt: int, group: Group, newer: bool = False
) -> list[Found]:
    """What nodes hold in full, the newest first. Collective.

    One that the shared filesystem had, and has no more, was deleted there: it stays deleted.

    Args:
        newer: only what is newer than all that the shared filesystem has.

    Raises:
        CheckpointError: a node's folder, or the shared one, cannot be read; on every rank.
    """
    views = [json.loads(view) for view in all_ranks(group, lambda: _view(tier, run_id))]
    wanted = json.loads(first_rank(group, lambda: _whole(root, attempt, views, newer)))
    return [
        Found(step=step, where="on the nodes", bring=partial(_bring, root, tier, _gather(views, name), attempt, group))
        for step, name in wanted
    ]


def reclaim(
    root: Path, tier: NodeTier, *, run_id: str, attempt: int, group: Group, report: Report | None = None
) -> int | None:
    """Commit the newest checkpoint that nodes hold in full, if it is newer than what the shared filesystem has.

    Collective.

    Args:
        report: called on rank 0 for each that is newer and cannot be used.

    Returns:
        Its step, on every rank; None when there is none.

    Raises:
        CheckpointError: the shared filesystem does not take it; on every rank. The nodes' copies are as they were.
    """
    found = on_nodes(root, tier, run_id=run_id, attempt=attempt, group=group, newer=True)
    return _first(found, group, report)


def _first(found: Sequence[Found], group: Group, report: Report | None) -> int | None:
    for each in found:
        try:
            each.bring()
            return each.step
        except CorruptCheckpoint as error:
            tell(each, error, group, report)
    return None


def tell(found: Found, error: CorruptCheckpoint, group: Group, report: Report | None) -> None:
    """Report one that turned out bad, on rank 0."""
    if group.rank == 0 and report is not None:
        report(Path(folders.step_name(found.step)), f"{found.where}: {reason(error)}")


def _view(tier: NodeTier, run_id: str) -> bytes:
    """What this rank's node holds, as JSON: [node, {name: [attempt, step, world size, durable, shards]}].

    The world size is 0 where the manifest is missing.
    """
    copies: dict[str, Any] = {}
    for each in nodelocal.held(tier.home):
        manifest = each.manifest
        foreign = manifest is not None and manifest.identity.run_id != run_id
        size = 0 if manifest is None or foreign else manifest.identity.world_size
        copies[each.folder.name] = [each.attempt, each.step, size, each.durable, each.shards]
    return json.dumps([tier.node, copies]).encode()


def _whole(root: Path, attempt: int, views: Sequence[Any], newer: bool) -> bytes:
    """Steps and names of the saves that all nodes together hold in full, as JSON, the newest first."""
    folders.sweep_drafts(root, attempt)
    last = (-1, -1)
    if newer and (whole := inventory(root)):
        last = (whole[0].attempt, whole[0].step)
    there = {step for step, _ in folders.committed(root)}
    found: dict[str, tuple[int, int]] = {}
    for name in {name for _, copies in views for name in copies}:
        held = [copies[name] for _, copies in views if name in copies]
        age, durable = (held[0][0], held[0][1]), any(entry[3] for entry in held)
        size = max(entry[2] for entry in held)
        shards = {shard for entry in held for shard in entry[4]}
        if age > last and size and shards.issuperset(range(size)) and (not durable or age[1] in there):
            found[name] = age
    ordered = sorted(found, key=lambda name: found[name], reverse=True)
    return json.dumps([(found[name][1], name) for name in ordered]).encode()


def _gather(views: Sequence[Any], name: str) -> _Copies:
    having = [(rank, node, copies[name]) for rank, (node, copies) in enumerate(views) if name in copies]
    size = max(entry[2] for _, _, entry in having)
    holders = []
    for shard in range(size):
        by_node: dict[int, list[int]] = {}
        for rank, node, entry in having:
            if shard in entry[4]:
                by_node.setdefault(node, []).append(rank)
        # The ranks of a node share what it holds.
        holders.append([ranks[shard % len(ranks)] for _, ranks in sorted(by_node.items())])
    return _Copies(name=name, source=next(rank for rank, _, entry in having if entry[2]), holders=holders)


def _bring(root: Path, tier: NodeTier, copies: _Copies, attempt: int, group: Group) -> None:
    folder = tier.home / copies.name
    content = _read(folder / MANIFEST) if group.rank == copies.source else b""
    manifest = Manifest.unseal(group.broadcast(content, copies.source))
    _through_draft(
        root, manifest, attempt, group, lambda draft: _copy_all(folder, draft, manifest, copies.holders, group)
    )


def _read(path: Path) -> bytes:
    """A file; nothing when it cannot be read any more: the other ranks wait to hear of it."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _through_draft(root: Path, manifest: Manifest, attempt: int, group: Group, fill: Callable[[Path], None]) -> None:
    """Make a draft, have it filled, commit it. Collective; what fails leaves no draft."""
    step = manifest.identity.step
    token = first_rank(group, lambda: drafts.make_draft(root, step, attempt, manifest.size_bytes)).decode()
    draft = root / folders.draft_name(step, attempt, token)
    try:
        fill(draft)
        first_rank(group, lambda: drafts.commit(root, draft, manifest))
    except CheckpointError:
        if group.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _copy_all(folder: Path, draft: Path, manifest: Manifest, holders: Sequence[Sequence[int]], group: Group) -> None:
    """Each shard from its first holder; what turns out bad there from the next, and so on."""
    missing, faults = dict.fromkeys(range(len(holders)), 0), []
    while missing:
        mine = [shard for shard, turn in missing.items() if holders[shard][turn] == group.rank]
        outcomes = all_ranks(group, lambda mine=mine: _copy_mine(folder, draft, mine, manifest))  # type: ignore[misc]
        bad = {int(shard): why for outcome in outcomes for shard, why in json.loads(outcome).items()}
        faults += [why for _, why in sorted(bad.items())]
        missing = {shard: missing[shard] + 1 for shard in sorted(bad)}
        if any(turn == len(holders[shard]) for shard, turn in missing.items()):
            raise CorruptCheckpoint("; ".join(faults))


def _copy_mine(folder: Path, draft: Path, shards: Sequence[int], manifest: Manifest) -> bytes:
    """Copy these; JSON of those that are bad here, and why. Raises OSError when the draft takes no more."""
    bad = {}
    for shard in shards:
        try:
            copy_shard(folder, draft, shard, manifest)
        except CorruptCheckpoint as error:
            bad[shard] = reason(error)
            (draft / data_name(shard)).unlink(missing_ok=True)
    return json.dumps(bad).encode()


def at_remote(root: Path, url: str, *, run_id: str, attempt: int, group: Group) -> list[Found]:
    """What the remote has, the newest first. Collective.

    Raises:
        CheckpointError: it cannot be asked; on every rank.
    """
    remote: list[Remote] = []

    def connect() -> bytes:
        remote.append(Remote(url, run_id))
        return b""

    all_ranks(group, connect)
    steps = json.loads(first_rank(group, lambda: json.dumps(remote[0].steps()).encode()))
    return [
        Found(step=step, where=f"on {url}", bring=partial(_fetch_step, root, remote[0], step, attempt, group))
        for step in steps
    ]


def fetch(root: Path, url: str, *, run_id: str, attempt: int, group: Group, report: Report | None = None) -> int | None:
    """Commit the newest checkpoint that the remote has and that verifies. Collective.

    Args:
        report: called on rank 0 for each that cannot be used.

    Returns:
        Its step, on every rank; None when there is none.

    Raises:
        CheckpointError: the remote cannot be asked, or does not deliver; on every rank.
    """
    return _first(at_remote(root, url, run_id=run_id, attempt=attempt, group=group), group, report)


def _fetch_step(root: Path, remote: Remote, step: int, attempt: int, group: Group) -> None:
    manifest = Manifest.unseal(first_rank(group, lambda: remote.manifest(step)))
    mine = range(manifest.identity.world_size)[group.rank :: group.size]

    def fill(draft: Path) -> None:
        all_ranks(group, lambda: _fetched(remote, manifest, mine, draft))

    _through_draft(root, manifest, attempt, group, fill)


def _fetched(remote: Remote, manifest: Manifest, ranks: Sequence[int], draft: Path) -> bytes:
    remote.fetch(manifest, ranks, draft)
    return b""
