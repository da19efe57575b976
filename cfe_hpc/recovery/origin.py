"""The run that another one goes on from: `checkpoint.resume_from`."""

from __future__ import annotations

import os
from pathlib import Path

from cfe_hpc.config.run import RunSpec
from cfe_hpc.runfolder import RUN_ID, RunFolder

__all__ = ["origin_at", "origin_of"]


def origin_of(folder: RunFolder, spec: RunSpec) -> RunFolder | None:
    """The run that this one begins with while it has no checkpoint of its own; None where it begins at step 0."""
    stated = spec.job.checkpoint.resume_from
    if stated is None:
        return None
    return origin_at(stated, workdir=Path(spec.provenance.workdir), runs_root=folder.top.path.parent.parent)


def origin_at(stated: str, *, workdir: Path, runs_root: Path) -> RunFolder:
    """The run that is meant: an id under the same runs root, of a sweep's task too, else a folder. Looks at no disk.

    Args:
        workdir: folder of submission, where a relative path begins.
    """
    run_id, dot, task = stated.rpartition(".")
    if not (dot and RUN_ID.match(run_id) and task.isdigit()):
        run_id, task = stated, ""
    if "/" in stated or not RUN_ID.match(run_id):
        return RunFolder(Path(os.path.normpath(workdir / Path(stated).expanduser())))
    run = RunFolder(runs_root / run_id.rsplit("-", 3)[0] / run_id)
    return run.task(int(task)) if task else run
