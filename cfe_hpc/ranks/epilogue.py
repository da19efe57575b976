"""`python -m cfe_hpc.ranks.epilogue RUN_DIR STATUS`: what the batch script does when srun has returned.

A stop has been dealt with by the ranks, as a rule. What is left is an attempt that ended badly by itself, or without
a word: its budget decides whether Slurm gets the job back. A job that is being preempted, or out of time, comes here
when its ranks broke down instead of saving: to exit now would lose it, so it is requeued for that reason. A job that
Slurm is ending for good is left to Slurm.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError
from cfe_hpc.metrics.exporter import withdraw
from cfe_hpc.ranks.env import slurm_job_id
from cfe_hpc.ranks.patience import insist
from cfe_hpc.ranks.scheduler import JobRecord, ask_for_another, show_job
from cfe_hpc.ranks.stopping import hold, promise_next
from cfe_hpc.recovery.attempts import cause_of, read_attempts
from cfe_hpc.recovery.budgets import decide
from cfe_hpc.recovery.causes import Cause
from cfe_hpc.recovery.effects import carry_out
from cfe_hpc.recovery.evidence import Fault, find, oom_kills
from cfe_hpc.recovery.result import close_books, write_result
from cfe_hpc.recovery.witnesses import batch_err_bytes
from cfe_hpc.runfolder import RunFolder

__all__ = ["close_failed_attempt", "main", "note_end"]

_GATEWAY_TIMEOUT_S = 5.0


def close_failed_attempt(
    folder: RunFolder, *, attempt: int, status: int, cause: Cause | None = None, oom_kills: int = 0
) -> bool:
    """Decide what follows an attempt whose ranks ended with `status` and no word about a next one.

    Writes the events, and result.json when nothing follows. The batch script and the local supervisor call it.

    Args:
        cause: "preempted" or "time_limit" when the ranks ended inside such a stop, which then counts instead of what
            they failed of.
        oom_kills: processes that the kernel has killed in the attempt's memory cgroup.

    Returns:
        True when another attempt shall follow: it is promised, and the caller starts or requests it.
    """
    spec = RunSpec.read(folder.run_toml)
    withdraw(spec, run_id=spec.run_id, timeout_s=_GATEWAY_TIMEOUT_S)  # ranks that died could not
    fault: Fault | None = None
    if cause == "preempted":
        folder.note_event("preempted", attempt=attempt, detail="the ranks ended without having saved")
    else:
        restart = max((each.restart for each in read_attempts(folder.events()) if each.number == attempt), default=0)
        fault = find(folder, attempt=attempt, restart=restart, status=status, oom_kills=oom_kills)
        _tell(folder, attempt, fault)
        cause = cause or fault.cause
    decision = decide(spec.job.recovery, folder.events(), cause=cause)
    carry_out(folder, decision.effects, attempt=attempt)
    if decision.action == "requeue":
        folder.note_event("requeued", attempt=attempt, reason=cause, detail=decision.why)
        return promise_next(folder, attempt=attempt, reason=cause)
    why = decision.why if decision.action == "fail" else _hold(folder, attempt, cause, decision.why, fault)
    state: Literal["HELD", "FAILED"] = "HELD" if decision.action == "hold" else "FAILED"
    write_result(folder, state, attempts=attempt + 1, reason=why)
    return False


def _hold(folder: RunFolder, attempt: int, cause: Cause, why: str, fault: Fault | None) -> str:
    """Hold the run, with the line of the log that says why; the reason in full."""
    detail = None
    if fault is not None and fault.line is not None:
        detail = {"log": fault.log, "line": fault.line}
        if fault.line.removeprefix("error: ") not in why:
            why = f"{why}; {fault.log}: {fault.line}"
    hold(folder, attempt=attempt, step=None, why=why, cause=cause, detail=detail)
    return why


def _tell(folder: RunFolder, attempt: int, fault: Fault) -> None:
    """Write down what was found, unless a rank has said just that."""
    failed = (event for event in folder.events() if event["event"] == "failed" and event.get("attempt") == attempt)
    if not any(event.get("reason") == fault.why and cause_of(event) == fault.cause for event in failed):
        folder.note_event(
            "failed", attempt=attempt, rank=fault.rank, host=fault.host, cause=fault.cause, reason=fault.why
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line; always 0: the batch script ends with srun's status, not with this one's."""
    run_dir, status = (sys.argv[1:] if argv is None else argv)[:2]
    folder = RunFolder(Path(run_dir))
    attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job_id = slurm_job_id(os.environ)
    note_end(folder, attempt=attempt, status=int(status), job_id=job_id)
    if folder.result() is not None:
        close_books(folder)
    else:
        _conclude(folder, attempt=attempt, status=int(status), job_id=job_id)
    return 0


def _conclude(folder: RunFolder, *, attempt: int, status: int, job_id: str) -> None:
    """Have another attempt, or a result, where the ranks have left neither."""
    if folder.promised(f"requeued-{attempt}") or folder.promised("cancel"):
        return
    held = folder.promised("held")
    if held is not None:
        write_result(folder, "HELD", attempts=attempt + 1, reason=str(held.get("reason", "")))
        return
    try:
        # To end without having asked would lose the run.
        record = insist(lambda: show_job(job_id))
        if record.state != "RUNNING":
            return
        killed = oom_kills(job_id=os.environ["SLURM_JOB_ID"]) or 0  # by which cgroups are named
        if close_failed_attempt(folder, attempt=attempt, status=status, cause=_cause(record), oom_kills=killed):
            _request(folder, job_id, attempt)
    except CfeError as error:
        print(f"cfe_hpc: {error}", file=sys.stderr)


def note_end(folder: RunFolder, *, attempt: int, status: int, job_id: str) -> None:
    """Note that the ranks of an attempt have ended, and how much its batch script's log held by then."""
    size_bytes = batch_err_bytes(folder, job_id)
    name, meaning = f"ended-{attempt}", f"attempt {attempt} has ended with status {status}"
    folder.note(name, meaning, status=status, job_id=job_id, batch_err_bytes=size_bytes)


def _cause(record: JobRecord) -> Cause | None:
    """Of a stop; None when none was under way."""
    if record.preempt_time is not None:
        return "preempted"
    return "time_limit" if record.past_limit else None


def _request(folder: RunFolder, job_id: str, attempt: int) -> None:
    """Ask for the attempt that is promised; a run that cannot be requeued is held, lest it looks as if it waited."""
    plan = RunSpec.read(folder.run_toml).plan
    try:
        insist(lambda: ask_for_another(folder, plan, job_id, next_attempt=attempt + 1))
    except CfeError as error:
        why = f"another attempt is due, but the requeue failed: {error}"
        hold(folder, attempt=attempt, step=None, why=why)
        write_result(folder, "HELD", attempts=attempt + 1, reason=why)


if __name__ == "__main__":
    sys.exit(main())
