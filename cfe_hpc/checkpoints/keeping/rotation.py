"""Which checkpoints stay: a union of reasons to keep; the rest is deleted. No torch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from cfe_hpc.checkpoints import folders, marks
from cfe_hpc.checkpoints.keeping.remover import Remover
from cfe_hpc.checkpoints.manifest import Manifest
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.errors import CorruptCheckpoint

__all__ = ["Kept", "Policy", "Retention", "Rotation", "glance", "inventory", "reasons", "rotate"]

_log = logging.getLogger(__name__)


class Policy(Protocol):
    """What stays; config.job.Checkpoint is one, and says what each means."""

    @property
    def keep_last(self) -> int: ...
    @property
    def keep_every_steps(self) -> int | None: ...
    @property
    def keep_best(self) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """A Policy by itself, for a process that has no job file and loads no models of one."""

    keep_last: int
    keep_every_steps: int | None = None
    keep_best: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What rotation needs to know of a checkpoint whose manifest reads.

    Attributes:
        step: after which it was saved.
        metrics: logged values at that step; may hold NaN.
        marks: the marks that keep it; see checkpoints.marks.
    """

    path: Path
    step: int
    attempt: int
    metrics: Mapping[str, float]
    marks: frozenset[str] = frozenset()


def glance(folder: Path, run_id: str | None = None) -> Manifest:
    """The manifest of a checkpoint whose files are all there in their sizes; their bytes are not read.

    Raises:
        CorruptCheckpoint: the manifest does not verify, or a file is missing or of another size.
    """
    manifest = read_manifest(folder, run_id)
    for name, facts in manifest.files.items():
        try:
            size_bytes = (folder / name).stat().st_size
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{name} is missing") from error
        except OSError as error:
            raise CorruptCheckpoint(f"{name} cannot be read: {error.strerror}") from error
        if size_bytes != facts.size_bytes:
            raise CorruptCheckpoint(f"{name} has {size_bytes} bytes instead of {facts.size_bytes}")
    return manifest


class _Shelf:
    """The checkpoints of one folder, and what was once read of them: a committed one does not change.

    A look costs one listing of the folder, and a read of each manifest that is new since the last.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[int, Kept]] = {}
        self._whole: dict[str, tuple[int, int]] = {}

    def look(self) -> list[Kept]:
        """Those whose manifests read, the last committed one first.

        A later attempt commits later: what an attempt saved after it went back comes before the steps it left behind.

        Raises:
            OSError: the folder cannot be listed; a missing one is empty.
        """
        inodes, marked = self._list()
        self._known = dict(self._read(inodes))
        self._whole = {name: facts for name, facts in self._whole.items() if name in self._known}
        found = {name: kept for name, (_, kept) in self._known.items()}
        found.update({name: replace(found[name], marks=frozenset(marked[name])) for name in marked if name in found})
        return sorted(found.values(), key=lambda each: (each.attempt, each.step), reverse=True)

    def _list(self) -> tuple[dict[str, int], dict[str, set[str]]]:
        """The inodes of committed folders, and the keeping marks of steps, by folder name."""
        inodes: dict[str, int] = {}
        marked: dict[str, set[str]] = {}
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    mark = marks.parse(entry.name)
                    if mark is not None and mark[1] in marks.KEEPING:
                        marked.setdefault(mark[0], set()).add(mark[1])
                    elif folders.step_of(entry.name) is not None:
                        inodes[entry.name] = entry.inode()
        except FileNotFoundError:
            pass
        return inodes, marked

    def _read(self, inodes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, Kept]]]:
        for name, inode in inodes.items():
            known = self._known.get(name)
            if known is not None and known[0] == inode:
                yield name, known
                continue
            path = self._root / name
            try:
                manifest = read_manifest(path)
            except CorruptCheckpoint:
                continue
            identity = manifest.identity
            kept = Kept(path=path, step=identity.step, attempt=identity.attempt, metrics=manifest.metrics)
            yield name, (inode, kept)

    def is_whole(self, kept: Kept) -> bool:
        """Whether all its files are there in their sizes: looked at once, and again when its folder has changed."""
        try:
            facts = os.stat(kept.path)
        except OSError:
            return False
        seen = (facts.st_ino, facts.st_mtime_ns)
        if self._whole.get(kept.path.name) == seen:
            return True
        try:
            glance(kept.path)
        except CorruptCheckpoint:
            return False
        self._whole[kept.path.name] = seen
        return True


def inventory(root: Path) -> list[Kept]:
    """The checkpoints in `root` that are whole at first sight, the last committed one first."""
    shelf = _Shelf(root)
    return [each for each in shelf.look() if shelf.is_whole(each)]


def reasons(
    checkpoints: Sequence[Kept],
    policy: Policy,
    protect: Mapping[int, str],
    is_whole: Callable[[Kept], bool] = lambda kept: True,
) -> dict[int, list[str]]:
    """Why each checkpoint stays, by step, in words of one: those without a reason may go.

    last: among the last `keep_last`; every: on a step of `keep_every_steps`; best: by `keep_best`; pinned, epoch: so
    marked; and the words of `protect`.

    Args:
        checkpoints: the last committed one first.
        protect: steps that stay whatever the policy says, and why.
        is_whole: asked of those alone that count for something: one that is not is passed over.
    """
    found: dict[int, list[str]] = {each.step: [] for each in checkpoints}
    for each in islice(filter(is_whole, checkpoints), policy.keep_last):
        found[each.step].append("last")
    if policy.keep_every_steps is not None:
        for step in found:
            if step % policy.keep_every_steps == 0:
                found[step].append("every")
    if policy.keep_best is not None:
        for each in islice(filter(is_whole, _by_rank(checkpoints, policy.keep_best)), 1):
            found[each.step].append("best")
    for each in checkpoints:
        found[each.step] += sorted(each.marks, reverse=True)
        if each.step in protect:
            found[each.step].append(protect[each.step])
    return found


def _by_rank(checkpoints: Sequence[Kept], rule: str) -> list[Kept]:
    """Those with a value for `keep_best`, the best first, and of equals the newest."""
    metric, _, end = rule.rpartition(":")
    sign = 1 if end == "min" else -1
    values = [(sign * each.metrics.get(metric, math.nan), place, each) for place, each in enumerate(checkpoints)]
    return [each for value, _, each in sorted(entry for entry in values if not math.isnan(entry[0]))]


class Rotation:
    """The rotation of one run's checkpoints by one process, again and again. Rank 0, or its writer, has one.

    What is superfluous loses its name at once, and its files in the background. What it costs does not grow with the
    checkpoints that are there.
    """

    def __init__(self, root: Path, policy: Policy) -> None:
        self._root, self._policy = root, policy
        self._shelf = _Shelf(root)
        self._remover = Remover(root)

    def prepare(self) -> None:
        """Read what there is, so that the first `rotate` costs no more than later ones, and finish, in the
        background, deletions that were cut short. Failures are logged."""
        try:
            reasons(self._shelf.look(), self._policy, {}, self._shelf.is_whole)
        except OSError as error:
            _log.warning("%s cannot be listed: %s", self._root, error.strerror)
        self._remover.wake()

    def rotate(self, *, protect: Collection[int] = ()) -> list[int]:
        """Take out what the policy does not keep, to be deleted in the background.

        What is not whole is left where it is and counts for nothing. Failures are logged, never raised.

        Args:
            protect: steps that stay in any case: the one resumed from, the newest one known to verify.

        Returns:
            The steps taken out, ascending.
        """
        try:
            checkpoints = self._shelf.look()
        except OSError as error:
            _log.warning("%s cannot be listed: %s", self._root, error.strerror)
            return []
        why = reasons(checkpoints, self._policy, dict.fromkeys(protect, "protected"), self._shelf.is_whole)
        doomed = (each for each in checkpoints if not why[each.step])
        gone = [each for each in doomed if self._shelf.is_whole(each) and folders.take_out(each.path)]
        for each in gone:
            with contextlib.suppress(OSError):
                marks.remove(each.path, "verified")
        self._remover.wake()
        return sorted(each.step for each in gone)

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait until what was taken out is deleted, at full speed from now on: at the end of a run, or to have the
        space. At a stop there is no time for it, nor need: the next attempt goes on with it.

        Returns:
            Whether everything is. With no `timeout_s` it is.
        """
        self._remover.wake()
        return self._remover.finish(timeout_s)


def rotate(root: Path, policy: Policy, *, protect: Collection[int]) -> list[int]:
    """`Rotation.rotate` once, with everything deleted on return."""
    rotation = Rotation(root, policy)
    gone = rotation.rotate(protect=protect)
    rotation.finish()
    return gone
