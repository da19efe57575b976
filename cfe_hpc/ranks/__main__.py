"""`python -m cfe_hpc.ranks RUN_DIR`: one rank of a run, however it was started."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError
from cfe_hpc.ranks import loading, signals
from cfe_hpc.ranks.env import RankFacts, read_facts
from cfe_hpc.ranks.inquest import examine
from cfe_hpc.ranks.preflight import leave_avoided
from cfe_hpc.ranks.scheduler import choose
from cfe_hpc.ranks.stopping import Ended, Inquiry, conclude
from cfe_hpc.recovery.causes import of_exception
from cfe_hpc.recovery.result import write_result
from cfe_hpc.runfolder import RunFolder

__all__ = ["find_entry", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Be a rank until the job's entry or command ends; returns the exit status."""
    (run_dir,) = sys.argv[1:] if argv is None else argv
    folder = RunFolder(Path(run_dir))
    spec = RunSpec.read(folder.run_toml)
    os.environ["CFE_RUN_DIR"] = str(folder.path)
    os.chdir(spec.provenance.start_folder)
    facts = read_facts()
    code = _not_to_begin(folder, facts)
    if code is None and facts.rank == 0:
        code = _stopped_already(folder, spec, facts)
        if code is None and "CFE_WORKER" not in os.environ:  # what started a worker has asked
            code = examine(folder, spec, facts)
            code = leave_avoided(folder, spec, facts) if code is None else code
    if code is not None:
        return code
    by_launcher = spec.plan.launcher != "srun" and "CFE_WORKER" not in os.environ
    if by_launcher or spec.job.command is not None:
        from cfe_hpc.ranks.agent import run_agent
        from cfe_hpc.ranks.command import run_command

        try:
            return (run_agent if by_launcher else run_command)(folder, spec, facts)
        except CfeError as error:
            _report(folder, facts.attempt, facts.rank, error)
            return error.exit_code
    signals.install()
    loading.begins()
    return _run_entry(folder, spec, facts)


def _not_to_begin(folder: RunFolder, facts: RankFacts) -> int | None:
    """The status to exit with when no further attempt of this run may begin; None when one may.

    A scheduler starts attempts on its own, too: Slurm from 24.05 on requeues a job that ends in its grace time, and
    a `cancel` may cross with a requeue.
    """
    cancel, held = folder.promised("cancel"), folder.promised("held")
    if facts.restart and folder.promised(f"requeued-{facts.attempt}") is not None:
        return 0  # a launcher that starts the ranks again knows nothing of the attempt that follows
    if cancel is not None:
        print(f"cfe_hpc: {folder.run_id} was cancelled: no attempt begins", file=sys.stderr)
        if facts.rank == 0 and folder.result() is None:
            folder.note_event("cancelled", attempt=facts.attempt, reason="cancelled before the attempt began")
            write_result(folder, "CANCELLED", attempts=facts.attempt + 1, reason="cancelled by the user")
        return 0
    if held is not None:
        print(
            f"error: {folder.run_id}: is held ({held.get('reason')}); send it back with `cfe-hpc requeue "
            f"{folder.run_id}`",
            file=sys.stderr,
        )
        return 1
    return None


def _stopped_already(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> int | None:
    """Deal with a stop that came before this process could hear signals, while there is nothing to save; the status
    to exit with, or None without such a stop. Rank 0's; the others are ended by what it has asked for."""
    scheduler = choose(folder, facts, spec.plan)
    if not scheduler.stopping_already():
        return None
    folder.note_event("signal", attempt=facts.attempt, reason="found")
    inquiry = Inquiry(scheduler, [], spec)
    verdict = conclude(
        folder, scheduler, spec, SoloGroup(), inquiry=inquiry, attempt=facts.attempt, step=None, started_s=None
    )
    if verdict.action == "cancelled" or verdict.action == "held":
        state: Literal["CANCELLED", "HELD"] = "CANCELLED" if verdict.action == "cancelled" else "HELD"
        write_result(folder, state, attempts=facts.attempt + 1, reason=verdict.why)
    return verdict.exit_code


def _run_entry(folder: RunFolder, spec: RunSpec, facts: RankFacts) -> int:
    from cfe_hpc.ranks.run import join

    run = None
    try:
        run = join()
        find_entry(spec)(run)
        _leave_process_group()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end, Ended) and (run is None or not run.ended):
            _report(folder, facts.attempt, facts.rank, end)
        return code
    except BaseException as error:
        _report(folder, facts.attempt, facts.rank, error)
        if run is not None:
            run.abandon()
        # Not `return`: threads of a broken collective would keep the interpreter, and so the whole job, from ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, CfeError) else 1)
    return 0


def find_entry(spec: RunSpec) -> Callable[[Any], Any]:
    """The function of the job's `entry`, its module imported."""
    # `python -m` has put the starting folder on the path, which need not be where the job was submitted.
    sys.path.insert(0, spec.provenance.start_folder)
    module, _, function = (spec.job.entry or "").partition(":")
    entry: Callable[[Any], Any] = getattr(import_module(module), function)
    return entry


def _leave_process_group() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def _report(folder: RunFolder, attempt: int, rank: int, error: BaseException) -> None:
    """Say what went wrong: to this rank's log, in full unless the message is made for users, and as an event."""
    if isinstance(error, CfeError):
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    else:
        traceback.print_exception(type(error), error, error.__traceback__)
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    try:
        folder.append_event(
            "failed",
            attempt=attempt,
            rank=rank,
            host=os.uname().nodename,
            cause=of_exception(error),
            reason=reason[:500],
        )
    except OSError as unwritable:
        print(f"cfe_hpc: the event could not be written: {unwritable}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
