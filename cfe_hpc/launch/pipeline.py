"""Sending a pipeline: a run for each stage, with the scheduler told what each waits for. No process stays to watch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cfe_hpc.config.run import Plan, RunSpec
from cfe_hpc.config.stage import StageJob, filled_in, referenced
from cfe_hpc.errors import CfeError, UsageError
from cfe_hpc.launch.ending import cancel
from cfe_hpc.launch.provenance import WorkTree
from cfe_hpc.launch.snapshot import Told
from cfe_hpc.launch.submission import Submitted, preview, submit
from cfe_hpc.runfolder import RunFolder

__all__ = ["PlannedStage", "preview_pipeline", "submit_pipeline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage and what it takes of the site."""

    job: StageJob
    planned: Plan


def submit_pipeline(
    stages: Sequence[PlannedStage],
    work_tree: WorkTree,
    *,
    after: Sequence[RunFolder] = (),
    reused: Mapping[str, RunFolder] | None = None,
    told: Told | None = None,
) -> list[Submitted]:
    """Send every stage, in this order, each to start when those that it waits for have completed.

    All or none: when one is refused, those that were sent before it are cancelled.

    Args:
        after: runs that must have completed before any stage starts.
        reused: stages whose runs are there already, by name.
        told: as for `launch.snapshot.take`.

    Raises: as `launch.submission.submit`; and UsageError when a stage refers to one that is neither sent nor reused.
    """
    _need_all(stages, reused or {})
    folders, sent = dict(reused or {}), list[Submitted]()
    for stage in stages:
        job = stage.job
        upstream = [folders[name] for name in job.after if name in folders]
        loaded = replace(job.loaded, job=filled_in(job.loaded.job, _values(folders)))
        try:
            submitted = submit(loaded, stage.planned, work_tree, after=upstream or after, told=told)
        except CfeError:
            for each in reversed(sent):
                cancel(each.folder)
            raise
        sent.append(submitted)
        folders[job.name] = submitted.folder
    return sent


def preview_pipeline(
    stages: Sequence[PlannedStage], work_tree: WorkTree, *, reused: Mapping[str, RunFolder] | None = None
) -> list[tuple[RunSpec, RunFolder, str]]:
    """What `submit_pipeline` would do now: run.toml, folder and script of each stage. Writes nothing."""
    _need_all(stages, reused or {})
    folders, shown = dict(reused or {}), []
    for stage in stages:
        job = stage.job
        loaded = replace(job.loaded, job=filled_in(job.loaded.job, _values(folders)))
        shown.append(preview(loaded, stage.planned, work_tree))
        folders[job.name] = shown[-1][1]
    return shown


def _values(folders: Mapping[str, RunFolder]) -> dict[str, dict[str, str]]:
    """What `config.stage.REFERENCES` lists, of each stage."""
    return {
        name: {
            "run_dir": str(folder.path),
            "run_id": folder.run_id,
            "checkpoints": str(folder.checkpoints),
            "exports": str(folder.exports),
        }
        for name, folder in folders.items()
    }


def _need_all(stages: Sequence[PlannedStage], reused: Mapping[str, RunFolder]) -> None:
    known = {*reused, *(stage.job.name for stage in stages)}
    for stage in stages:
        missing = sorted(referenced(stage.job.loaded.job) - known)
        if missing:
            remedy = " ".join(f"--reuse {name}=RUN" for name in missing)
            raise UsageError(
                f"{stage.job.loaded.job_file}: stage {stage.job.name} refers to {', '.join(missing)}, which is not "
                f"submitted with it; name the run that is meant: {remedy}"
            )
