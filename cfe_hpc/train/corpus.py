"""The token file that a job trains on: a path, or one built from the source of Python's standard library."""

from __future__ import annotations

import logging
from pathlib import Path

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.data.build import build
from cfe_hpc.data.sources import stdlib_sources

__all__ = ["STDLIB", "token_file"]

STDLIB = "stdlib"

logger = logging.getLogger(__name__)


def token_file(data: str, *, workdir: Path, run_folder: Path, group: Group) -> Path:
    """The file behind `params.data`. Collective.

    "stdlib" is built by rank 0 into the run folder, once for all attempts: another Python on a later node cannot
    change what the run trains on.

    Raises:
        DataError: this Python carries no sources, or the run folder cannot be written.
    """
    if data != STDLIB:
        return workdir / Path(data).expanduser()
    path = run_folder / "data" / "stdlib.h5"
    if group.rank == 0 and not path.exists():  # only rank 0 looks: NFS would remember an absence for the others
        path.parent.mkdir(exist_ok=True)
        report = build(path, stdlib_sources())
        logger.info("built %s from %d files in %.1f s", path, report.num_sources, report.seconds)
    group.barrier()
    return path
