"""Which checkpoints stay: a union of reasons to keep; the rest is deleted. No torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.manifest import Manifest
from cfe_hpc.checkpoints.reader import read_manifest
from cfe_hpc.errors import CorruptCheckpoint

__all__ = ["Kept", "Policy", "Retention", "glance", "inventory", "rotate", "superfluous"]


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
    """A checkpoint that is whole at first sight: its manifest reads, and its files are there in their sizes."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return self.manifest.identity.step


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


def inventory(root: Path) -> list[Kept]:
    """The checkpoints in `root` that are whole at first sight, the last committed one first.

    A later attempt commits later: what an attempt saved after it went back comes before the steps it left behind.
    """
    found = []
    for _, path in folders.committed(root):
        with contextlib.suppress(CorruptCheckpoint):
            found.append(Kept(path=path, manifest=glance(path)))
    return sorted(found, key=lambda each: (each.manifest.identity.attempt, each.step), reverse=True)


def superfluous(checkpoints: Sequence[Kept], policy: Policy, protect: Collection[int]) -> list[Kept]:
    """Those that no reason keeps: not among the last `keep_last`, not on a step of `keep_every_steps`, not the best
    by `keep_best`, not protected.

    Args:
        checkpoints: the last committed one first.
        protect: steps that stay whatever the policy says.
    """
    kept = {each.step for each in checkpoints[: policy.keep_last]} | set(protect)
    if policy.keep_every_steps is not None:
        kept |= {each.step for each in checkpoints if each.step % policy.keep_every_steps == 0}
    if policy.keep_best is not None:
        kept |= _best(checkpoints, policy.keep_best)
    return [each for each in checkpoints if each.step not in kept]


def _best(checkpoints: Sequence[Kept], rule: str) -> set[int]:
    metric, _, end = rule.rpartition(":")
    sign = -1 if end == "min" else 1
    values = [(each.manifest.metrics.get(metric, math.nan), each) for each in checkpoints]
    ranked = [(sign * value, -place, each.step) for place, (value, each) in enumerate(values) if not math.isnan(value)]
    return {max(ranked)[2]} if ranked else set()


def rotate(root: Path, policy: Policy, *, protect: Collection[int]) -> list[int]:
    """Delete what the policy does not keep, and finish deletions that were cut short. Rank 0 alone calls it.

    What is not whole is left where it is and counts for nothing. Failures to delete are logged, never raised.

    Args:
        protect: steps that stay in any case: the one resumed from, the newest one known to verify.

    Returns:
        The deleted steps, ascending.
    """
    folders.sweep_trash(root)
    doomed = superfluous(inventory(root), policy, protect)
    return sorted(each.step for each in doomed if folders.discard(each.path))
