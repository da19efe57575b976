"""`python -m cfe_hpc.ranks.refusal RUN_DIR WHY STATUS`: end a run, before ranks start, whose node lacks what it needs.

The batch script calls it. Another attempt would find the node, or the site, as it is: the run fails as an error of
configuration does. But what looked at the node may have been ended with the job, which says nothing about the node.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cfe_hpc.process import CommandError
from cfe_hpc.ranks import epilogue
from cfe_hpc.ranks.env import slurm_job_id
from cfe_hpc.ranks.epilogue import close_failed_attempt, note_end
from cfe_hpc.ranks.scheduler import show_job
from cfe_hpc.runfolder import RunFolder

__all__ = ["main"]

_BY_SIGNAL = 128
"""Shells report the end of a program by signal N as 128 + N."""


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line: STATUS is that of what looked; 0 when all that there is to say is written down."""
    run_dir, why, status = sys.argv[1:] if argv is None else argv
    folder = RunFolder(Path(run_dir))
    on_slurm = "SLURM_JOB_ID" in os.environ
    if (folder.result() or {}).get("state") == "COMPLETED":
        return 0  # it is the export that cannot be made
    if int(status) > _BY_SIGNAL and on_slurm:
        return epilogue.main([run_dir, status])
    if folder.promised("cancel") or (on_slurm and _is_ending()):
        return 0
    attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    host = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    folder.append_event("failed", attempt=attempt, host=host, cause="configuration", reason=why)
    note_end(folder, attempt=attempt, status=1, job_id=os.environ.get("SLURM_JOB_ID", f"local-{os.getppid()}"))
    close_failed_attempt(folder, attempt=attempt, status=1)
    return 0


def _is_ending() -> bool:
    """Whether Slurm is ending this job, and with it what looked at the node."""
    try:
        return show_job(slurm_job_id(os.environ)).state != "RUNNING"
    except CommandError:  # a node without scontrol still lacks what it lacks
        return False


if __name__ == "__main__":
    sys.exit(main())
