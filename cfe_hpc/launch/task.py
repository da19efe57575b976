"""What submitit unpickles on a node: a callable that holds the run folder's path, and becomes the rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from cfe_hpc.files import read_toml
from cfe_hpc.ranks.env import slurm_job_id
from cfe_hpc.ranks.redirect import redirect
from cfe_hpc.ranks.signals import STOP_SIGNALS
from cfe_hpc.runfolder import RunFolder

__all__ = ["RankTask"]


class RankTask:
    """Replace this process by the rank's: `python -u -m cfe_hpc.ranks RUN_DIR`, logging to the run folder.

    The pickle names this class and the path, nothing else: the submitter never imports a trainer, and edits made
    after submission change nothing but this package.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        """Never returns. Stop signals stay blocked across the exec; the rank, or a launcher's agent, unblocks them once
        it can hear them.

        submitit has just installed handlers that swallow TERM and requeue on USR2: the exec drops them.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        folder = RunFolder(Path(self.run_dir))
        if folder.is_sweep:  # one pickle for all its tasks: the script knows which this is
            folder = RunFolder(Path(os.environ["CFE_RUN_DIR"]))
        table: dict[str, Any] = read_toml(folder.run_toml)
        provenance = table["provenance"]
        redirect(_log_stem(folder, launcher=table["plan"].get("launcher", "srun")))
        os.chdir(provenance.get("start_in", provenance["workdir"]))
        python = provenance["python"]
        os.execvp(python, [python, "-u", "-m", "cfe_hpc.ranks", str(folder.path)])


def _log_stem(folder: RunFolder, *, launcher: str) -> Path:
    """logs/<job id>.<attempt>.<rank>, without the ending; for a launcher of ranks the node's number stands there."""
    env = os.environ
    attempt = int(env.get("CFE_ATTEMPT_BASE", "0")) + int(env.get("SLURM_RESTART_COUNT", "0"))
    task = int(env["SLURM_PROCID"])
    rank = task if launcher == "srun" else f"node{task}"
    return folder.logs / folder.log_stem(job_id=slurm_job_id(env), attempt=attempt, rank=rank)
