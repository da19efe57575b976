"""`python -m cfe_hpc.ranks.epilogue RUN_DIR STATUS`: what the batch script does when srun has returned.

A stop has been dealt with by the ranks. What is left is an attempt that ended badly by itself: its budget decides
whether Slurm gets the job back. A job that Slurm is ending anyway is left to Slurm.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cfe_hpc.config.run import RunSpec
from cfe_hpc.metrics.exporter import withdraw
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.scheduler import JobRecord
from cfe_hpc.ranks.stopping import hold
from cfe_hpc.recovery import ledger
from cfe_hpc.recovery.budgets import decide
from cfe_hpc.runfolder import RunFolder

__all__ = ["close_failed_attempt", "main"]

_SCONTROL_TIMEOUT_S = 30.0
_GATEWAY_TIMEOUT_S = 5.0


def close_failed_attempt(folder: RunFolder, *, attempt: int, status: int) -> bool:
    """Decide what follows an attempt whose ranks ended with `status` and no word about a next one.

    Writes the events, and result.json when nothing follows. The batch script and the local supervisor call it.

    Returns:
        True when another attempt shall follow: it is promised, and the caller starts or requests it.
    """
    spec = RunSpec.read(folder.run_toml)
    withdraw(spec, run_id=spec.run_id, timeout_s=_GATEWAY_TIMEOUT_S)  # ranks that died could not
    if not any(e["event"] == "failed" and e.get("attempt") == attempt for e in folder.events()):
        folder.append_event("failed", attempt=attempt, reason=f"the ranks ended with status {status}")
    decision = decide(spec.job.recovery, folder.events(), cause="failed")
    if decision.action == "requeue":
        folder.append_event("requeued", attempt=attempt, reason="failed", detail=decision.why)
        return folder.promise(f"requeued-{attempt}", reason="failed")
    if decision.action == "hold":
        hold(folder, attempt=attempt, step=None, why=decision.why)
    summary = ledger.summarise(folder)
    folder.write_result(
        {
            "state": "HELD" if decision.action == "hold" else "FAILED",
            "reason": decision.why,
            "final_step": summary.last_step,
            "attempts": attempt + 1,
            "lost_steps": summary.lost_steps,
            "goodput": summary.goodput,
            "wall_seconds": summary.wall_seconds,
            "weights_sha256": None,
            "metrics": {},
        }
    )
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line; always 0: the batch script ends with srun's status, not with this one's."""
    run_dir, status = (sys.argv[1:] if argv is None else argv)[:2]
    folder = RunFolder(Path(run_dir))
    attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if int(status) == 0 or folder.result() or folder.promised(f"requeued-{attempt}") or folder.promised("cancel"):
        return 0
    job_id = os.environ["SLURM_JOB_ID"]
    try:
        record = JobRecord.parse(run(["scontrol", "show", "job", "-o", job_id], timeout_s=_SCONTROL_TIMEOUT_S).stdout)
        if record.state != "RUNNING" or record.preempt_time is not None or record.past_limit:
            return 0
        if close_failed_attempt(folder, attempt=attempt, status=int(status)):
            run(["scontrol", "requeue", job_id], timeout_s=_SCONTROL_TIMEOUT_S)
    except CommandError as error:
        print(f"cfe_hpc: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
