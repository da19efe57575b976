"""`python -m cfe_hpc.ranks.refusal RUN_DIR WHY`: end a run whose node lacks what its job needs, before ranks start.

The batch script calls it. Another attempt would find the node, or the site, as it is: the run fails as an error of
configuration does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cfe_hpc.ranks.epilogue import close_failed_attempt, note_end
from cfe_hpc.runfolder import RunFolder

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line; 0 when the end of the run is written down."""
    run_dir, why = sys.argv[1:] if argv is None else argv
    folder = RunFolder(Path(run_dir))
    attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    host = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    if (folder.result() or {}).get("state") == "COMPLETED":
        return 0  # it is the export that cannot be made
    folder.append_event("failed", attempt=attempt, host=host, cause="configuration", reason=why)
    note_end(folder, attempt=attempt, status=1, job_id=os.environ.get("SLURM_JOB_ID", f"local-{os.getppid()}"))
    close_failed_attempt(folder, attempt=attempt, status=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
