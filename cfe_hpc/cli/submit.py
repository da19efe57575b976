"""`submit JOB`: plan it, check it, show it or send it."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common
from cfe_hpc.errors import ImpossibleError, PipelineError

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import Plan
    from cfe_hpc.launch.provenance import WorkTree
    from cfe_hpc.launch.submission import Submitted
    from cfe_hpc.recovery.measured import Measured

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "Plan a job for a site, check it and send it. What it needs is frozen in its run folder: later edits of job, "
        "site or environment never reach it. Exit codes: 0 sent (with --wait: completed), 1 ended otherwise, 2 job or "
        "site is wrong, 3 the scheduler refused or cannot be reached, 4 the job could never run there."
    )
    common.add_job_arguments(parser)
    common.add_partition_argument(parser)
    common.add_sweep_arguments(parser)
    common.add_ignore_argument(parser)
    parser.add_argument(
        "--after",
        metavar="RUN",
        action="append",
        default=[],
        help="start only when that run has completed; may be given again, for several",
    )
    parser.add_argument(
        "--reuse",
        metavar="STAGE=RUN",
        action="append",
        default=[],
        help="of a job with stages: that run stands for the stage, which is not sent; may be given again",
    )
    common.add_snapshot_argument(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the very script that would be sent; write nothing"
    )
    parser.add_argument("--wait", action="store_true", help="follow the run until it ends; Ctrl-C leaves it running")
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Submit, or show what would be submitted."""
    # Collecting garbage while modules are being loaded finds none, and costs a tenth of the whole command.
    gc.disable()
    try:
        return _run(args)
    finally:
        gc.enable()


def _run(args: argparse.Namespace) -> int:
    from cfe_hpc.launch.provenance import WorkTree

    work_tree = WorkTree(Path.cwd())
    from cfe_hpc.launch.history import plan_with_history

    try:
        if args.stage or args.reuse:
            return _submit_stages(args, work_tree)
        loaded = common.load_job(args)
    except PipelineError:
        return _submit_stages(args, work_tree)
    loaded = common.with_partition(loaded, work_tree)
    planned, measured = plan_with_history(loaded)
    _heed_checks(common.of_one_run(loaded), planned, measured)
    if loaded.job.sweep is not None:
        from cfe_hpc.cli.submit_sweep import heed_batches

        heed_batches(loaded, planned)
    if args.dry_run:
        return _show(args, loaded, planned, measured, work_tree)

    from cfe_hpc.cli.packing import packing, tell_left_out
    from cfe_hpc.launch.submission import submit
    from cfe_hpc.recovery.contract import sentence

    if planned.preemption.mode != "off":
        print(f"preemption: {sentence(planned, loaded.site, measured)}", file=sys.stderr)

    after = [common.find_run(args, ref, sweep=True) for ref in args.after]
    with packing() as told:
        submitted = submit(loaded, planned, work_tree, after=after, told=told)
    tell_left_out(submitted.packed, work_tree, wanted=loaded.job.snapshot.mode == "auto")
    if loaded.job.sweep is not None:
        from cfe_hpc.cli import submit_sweep

        submit_sweep.tell(args, submitted)
        return submit_sweep.wait(submitted) if args.wait else 0
    if args.json:
        common.print_json(_document(loaded, planned, submitted.folder.run_id, submitted.folder.path, submitted.job_id))
        sys.stdout.flush()
    else:
        print(f"{submitted.folder.run_id}  job {submitted.job_id}  {submitted.folder.path}", flush=True)
    return _wait(submitted) if args.wait else 0


def _submit_stages(args: argparse.Namespace, work_tree: WorkTree) -> int:
    from cfe_hpc.cli.submit_pipeline import run

    return run(args, work_tree)


def _heed_checks(loaded: Loaded, planned: Plan, measured: Measured | None) -> None:
    """Refuse a job that is sure to fail; say on standard error what else is worth knowing."""
    from cfe_hpc.launch.checks.checking import check

    findings = check(loaded, planned, measured=measured, notes=False)
    errors = [finding.problem for finding in findings if finding.severity == "error"]
    if errors:
        raise ImpossibleError(errors)
    for finding in findings:
        if finding.severity == "warning":
            print(f"warning: {finding.problem} [{finding.id}]", file=sys.stderr)


def _document(loaded: Loaded, planned: Plan, run_id: str, run_dir: Path, job_id: str | None) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "run_dir": str(run_dir),
        "job_id": job_id,
        "site": loaded.site.name,
        "partition": planned.partition,
        "nodes": planned.nodes,
        "world_size": planned.world_size,
    }


def _show(
    args: argparse.Namespace, loaded: Loaded, planned: Plan, measured: Measured | None, work_tree: WorkTree
) -> int:
    from cfe_hpc.launch.submission import preview

    spec, folder, script = preview(loaded, planned, work_tree)
    of_sweep: list[tuple[str, str]] = []
    if spec.job.sweep is not None:
        from cfe_hpc.cli import submit_sweep

        if args.json:
            submit_sweep.show(args, planned, spec, folder, script)
            return 0
        of_sweep = submit_sweep.plan_rows(spec)
    if args.json:
        document = _document(loaded, planned, spec.run_id, folder.path, job_id=None)
        plan_shown = planned.model_dump(mode="json")
        common.print_json({**document, "dry_run": True, "plan": plan_shown, "script": script})
        return 0
    from cfe_hpc.cli.check import plan_rows

    rows = plan_rows(common.of_one_run(loaded), planned, measured)
    for word, text in [*rows, *of_sweep, ("run folder", str(folder.path))]:
        print(f"{word:<12}{text}".replace("\n", "\\n"))
    print(f"\n{script}", end="")
    return 0


def _wait(submitted: Submitted) -> int:
    from cfe_hpc.launch.follow import follow

    gc.enable()
    run_id = submitted.folder.run_id
    try:
        state = follow(submitted.folder, submitted.spec, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print(f"\n{run_id} goes on; see `cfe-hpc status {run_id}`, end it with `cfe-hpc cancel`", file=sys.stderr)
        return 130
    print(f"{run_id}: {state}", file=sys.stderr)
    return 0 if state == "COMPLETED" else 1
