"""What the actions of `checkpoints` share: which checkpoints are meant, and what keeps them."""

from __future__ import annotations

from pathlib import Path

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.config.job import Checkpoint
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CorruptCheckpoint, RunFailed, UsageError
from cfe_hpc.runfolder import RunFolder

__all__ = ["chosen", "open_chosen", "policy_of", "resumed_step"]


def chosen(folder: RunFolder, step: int | None) -> list[Path]:
    """The checkpoint of a step, or all of them, newest first. Raises UsageError when there is none of that step."""
    found = folders.committed(folder.checkpoints)
    if step is None:
        return [path for _, path in found]
    wanted = [path for each, path in found if each == step]
    if not wanted:
        there = ", ".join(str(each) for each, _ in found[:8]) or "none"
        raise UsageError(f"{folder.run_id}: no checkpoint of step {step}; there are {there}")
    return wanted


def open_chosen(folder: RunFolder, step: int | None) -> Opened:
    """The checkpoint of a step, else the newest that opens; its tensors are checked as they are read.

    Raises:
        RunFailed: none can be used; says why of each.
    """
    reasons = []
    for path in chosen(folder, step):
        try:
            return Opened.at(path, folder.run_id)
        except CorruptCheckpoint as error:
            reasons.append(f"{path.name}: {error}")
    raise RunFailed("\n".join(reasons) or f"{folder.run_id} has no checkpoints")


def policy_of(folder: RunFolder) -> Checkpoint:
    """What the job says of its checkpoints."""
    return RunSpec.read(folder.run_toml).job.checkpoint


def resumed_step(folder: RunFolder) -> int | None:
    """The step that the last attempt resumed from."""
    steps = [event.get("step") for event in folder.events() if event.get("event") == "resumed"]
    return steps[-1] if steps and isinstance(steps[-1], int) else None
