"""`submit JOB` for a job with stages: plan and check all of them, show them or send them."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common
from cfe_hpc.errors import ImpossibleError, Problem, UsageError

if TYPE_CHECKING:
    from cfe_hpc.config.run import Plan
    from cfe_hpc.config.stage import StageJob
    from cfe_hpc.launch.pipeline import PlannedStage
    from cfe_hpc.launch.provenance import WorkTree
    from cfe_hpc.launch.submission import Submitted
    from cfe_hpc.recovery.measured import Measured
    from cfe_hpc.runfolder import RunFolder

__all__ = ["run"]


def run(args: argparse.Namespace, work_tree: WorkTree) -> int:
    """Submit every stage, or show what would be submitted."""
    from cfe_hpc.cli.packing import packing, tell_left_out
    from cfe_hpc.launch.history import plan_with_history
    from cfe_hpc.launch.pipeline import PlannedStage, submit_pipeline

    reused = _reused(args)
    jobs = [replace(job, loaded=common.with_partition(job.loaded, work_tree)) for job in _chosen(args, reused)]
    plans = [plan_with_history(job.loaded) for job in jobs]
    _heed_checks(jobs, plans)
    stages = [PlannedStage(job=job, planned=planned) for job, (planned, _) in zip(jobs, plans, strict=True)]
    if args.dry_run:
        return _show(args, stages, [measured for _, measured in plans], work_tree, reused)
    after = [common.find_run(args, ref, sweep=True) for ref in args.after]
    with packing() as told:
        sent = submit_pipeline(stages, work_tree, after=after, reused=reused, told=told)
    for each in sent:
        tell_left_out(each.packed, work_tree, wanted=each is sent[0] and each.spec.job.snapshot.mode == "auto")
    if args.json:
        rows = [(each.folder, each.job_id) for each in sent]
        common.print_json(_document(stages, rows))
        sys.stdout.flush()
    else:
        _print(stages, sent)
    return _wait(sent) if args.wait else 0


def _reused(args: argparse.Namespace) -> dict[str, RunFolder]:
    """The runs of --reuse, by stage."""
    found = {}
    for text in args.reuse:
        stage, equals, ref = text.partition("=")
        if not equals:
            raise UsageError(f"--reuse: {text}: is not STAGE=RUN; write for example data=demo-data-20260131")
        found[stage] = common.find_run(args, ref, sweep=True)
    return found


def _chosen(args: argparse.Namespace, reused: dict[str, RunFolder]) -> list[StageJob]:
    """The stages to send: that of --stage, or all but those that are reused."""
    from cfe_hpc.config.nearest import nearest
    from cfe_hpc.config.stage import load_pipeline

    if getattr(args, "sweep", None):
        raise UsageError("--sweep: a pipeline is no sweep; give a stage a [stage.sweep] of its own")
    jobs = load_pipeline(args.job, args.site, args.set, os.environ)
    names = [job.name for job in jobs]
    for option, wanted in (("--stage", [args.stage] if args.stage else []), ("--reuse", list(reused))):
        for name in wanted:
            if name not in names:
                near = nearest(name, names)
                hint = f"did you mean {near}?" if near else f"there are: {', '.join(names)}"
                raise UsageError(f"{option}: no such stage ({name}); {hint}")
    jobs = [job for job in jobs if job.name not in reused and args.stage in (None, job.name)]
    if not jobs:
        raise UsageError("--reuse: every stage is reused; nothing is left to submit")
    return [_ignoring(args, job) for job in jobs]


def _ignoring(args: argparse.Namespace, job: StageJob) -> StageJob:
    return replace(job, loaded=common.ignoring(job.loaded, getattr(args, "ignore", [])))


def _heed_checks(jobs: Sequence[StageJob], plans: Sequence[tuple[Plan, Measured | None]]) -> None:
    """Refuse a pipeline with a stage that is sure to fail; say what else is worth knowing, once."""
    from cfe_hpc.launch.checks.checking import check

    errors: dict[str, Problem] = {}
    warnings: dict[str, None] = {}
    for job, (planned, measured) in zip(jobs, plans, strict=True):
        for finding in check(common.of_one_run(job.loaded), planned, measured=measured, notes=False):
            if finding.severity == "error":
                errors[str(finding.problem)] = finding.problem
            elif finding.severity == "warning":
                warnings[f"{finding.problem} [{finding.id}]"] = None
    if errors:
        raise ImpossibleError(errors.values())
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _document(stages: Sequence[PlannedStage], rows: Sequence[tuple[RunFolder, str | None]]) -> dict[str, Any]:
    """The keys of a run's document, of the last stage, and `stages` with those of each."""
    each = [
        {
            "stage": stage.job.name,
            "after": list(stage.job.after),
            "run_id": folder.run_id,
            "run_dir": str(folder.path),
            "job_id": job_id,
            "site": stage.job.loaded.site.name,
            "partition": stage.planned.partition,
            "nodes": stage.planned.nodes,
            "world_size": stage.planned.world_size,
        }
        for stage, (folder, job_id) in zip(stages, rows, strict=True)
    ]
    last = {key: value for key, value in each[-1].items() if key not in ("stage", "after")}
    return {**last, "stages": each}


def _print(stages: Sequence[PlannedStage], sent: Sequence[Submitted]) -> None:
    width = max(len(stage.job.name) for stage in stages)
    for stage, each in zip(stages, sent, strict=True):
        print(f"{stage.job.name:<{width}}  {each.folder.run_id}  job {each.job_id}  {each.folder.path}", flush=True)


def _show(
    args: argparse.Namespace,
    stages: Sequence[PlannedStage],
    measured: Sequence[Measured | None],
    work_tree: WorkTree,
    reused: dict[str, RunFolder],
) -> int:
    from cfe_hpc.cli.check import plan_rows
    from cfe_hpc.launch.pipeline import preview_pipeline

    shown = preview_pipeline(stages, work_tree, reused=reused)
    if args.json:
        document = _document(stages, [(folder, None) for _, folder, _ in shown])
        for row, stage, (_, _, script) in zip(document["stages"], stages, shown, strict=True):
            row.update(plan=stage.planned.model_dump(mode="json"), script=script)
        common.print_json({**document, "dry_run": True})
        return 0
    for stage, known, (_, folder, script) in zip(stages, measured, shown, strict=True):
        waits = ", ".join(stage.job.after) or "nothing"
        rows = [("stage", f"{stage.job.name}, after {waits}"), *plan_rows(stage.job.loaded, stage.planned, known)]
        for word, text in [*rows, ("run folder", str(folder.path))]:
            print(f"{word:<12}{text}".replace("\n", "\\n"))
        print(f"\n{script}")
    return 0


def _wait(sent: Sequence[Submitted]) -> int:
    """Follow the stages one after another; 0 when all have completed. A stage that never starts ends the waiting."""
    from cfe_hpc.launch.follow import follow

    gc.enable()
    for each in sent:
        run_id = each.folder.run_id
        try:
            state = follow(each.folder, each.spec, lambda line: print(line, file=sys.stderr, flush=True))
        except KeyboardInterrupt:
            print(
                f"\n{run_id} and what follows it go on; see `cfe-hpc status`, end it with `cfe-hpc cancel`",
                file=sys.stderr,
            )
            return 130
        print(f"{run_id}: {state}", file=sys.stderr)
        if state != "COMPLETED":
            return 1
    return 0
