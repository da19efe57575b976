"""Acting together: what fails on one rank fails on all of them, with the same message, and nobody waits."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint, DiskFull, StagingError

__all__ = ["all_ranks", "first_rank", "kind_of", "raised", "reason"]

_KINDS = {
    kind.__name__: kind for kind in (CheckpointError, CheckpointMismatch, CorruptCheckpoint, DiskFull, StagingError)
}
_SHOWN_RANKS = 4


def reason(error: BaseException) -> str:
    """An error as one line: of an OSError the file's name and the system's words."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{Path(error.filename).name}: " if isinstance(error.filename, (str, Path)) else ""
        return f"{where}{error.strerror}"
    text = str(error).replace("\n", "; ")
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def kind_of(error: Exception) -> str:
    """The name of the error that another process raises for this one; see `raised`."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull.__name__
    return type(error).__name__ if type(error).__name__ in _KINDS else CheckpointError.__name__


def raised(kind: str, text: str) -> CheckpointError:
    """An error by the name that `kind_of` gave it."""
    return _KINDS[kind](text)


def _pack(error: Exception) -> bytes:
    text = str(error) if isinstance(error, CheckpointError) else reason(error)
    return b"-" + json.dumps([kind_of(error), text]).encode()


def _attempt(act: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
    try:
        return b"+" + act(), None
    except Exception as error:  # any failure at all: a rank that left here would leave the others waiting
        return _pack(error), error


def all_ranks(group: Group, act: Callable[[], bytes]) -> list[bytes]:
    """Call `act` on every rank. Collective.

    Returns:
        What each rank's `act` returned, by rank, on every rank.

    Raises:
        CheckpointError: `act` failed somewhere; the same message on every rank, naming the ranks that failed. A
            failure that all ranks share is told once.
    """
    outcome, error = _attempt(act)
    outcomes = group.all_gather(outcome)
    failed = [(rank, json.loads(found[1:])) for rank, found in enumerate(outcomes) if found[:1] == b"-"]
    if not failed:
        return [found[1:] for found in outcomes]
    raise raised(failed[0][1][0], _message(failed, group.size)) from error


def _message(failed: list[tuple[int, list[str]]], size: int) -> str:
    texts = {text for _, (_, text) in failed}
    if len(failed) == size and len(texts) == 1:
        return texts.pop()
    lines = [f"rank {rank}: {text}" for rank, (_, text) in failed[:_SHOWN_RANKS]]
    if len(failed) > _SHOWN_RANKS:
        lines.append(f"and {len(failed) - _SHOWN_RANKS} more ranks")
    return "; ".join(lines)


def first_rank(group: Group, act: Callable[[], bytes]) -> bytes:
    """Call `act` on rank 0 alone. Collective.

    Returns:
        What it returned, on every rank.

    Raises:
        CheckpointError: it failed; the same message on every rank.
    """
    outcome, error = _attempt(act) if group.rank == 0 else (b"", None)
    outcome = group.broadcast(outcome)
    if outcome[:1] == b"+":
        return outcome[1:]
    kind, text = json.loads(outcome[1:])
    raise raised(kind, text) from error
