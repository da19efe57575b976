"""What `submit` does otherwise for a sweep: checks the jobs of its tasks, tells of arrays, waits for all of them."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common
from cfe_hpc.config.environment import TRAIN_ENTRY
from cfe_hpc.errors import ConfigError, Problem

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import Plan, RunSpec
    from cfe_hpc.launch.submission import Submitted
    from cfe_hpc.runfolder import RunFolder

__all__ = ["heed_batches", "plan_rows", "show", "tell", "wait"]

_LOOK_EVERY_S = 2.0
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "HELD")


def heed_batches(loaded: Loaded, planned: Plan) -> None:
    """Refuse a sweep of the shipped training in which the batch of some task does not divide among the ranks: the other
    checks look at the first task alone.

    Raises:
        ConfigError: holds a problem for each such batch.
    """
    if loaded.job.entry != TRAIN_ENTRY or loaded.job.sweep is None:
        return
    from cfe_hpc.config.sweep_rules import read_tasks, task_job

    # By dotted name: nothing of the train side is loaded for other jobs.
    config = import_module("cfe_hpc.train.config")
    tasks, problems = read_tasks(loaded.job.sweep), dict[str, Problem]()
    for number in range(tasks.tasks):
        try:
            params = config.read_params(task_job(loaded.job, tasks, number).params, file=loaded.job_file)
            config.grad_accum_steps(params, world_size=planned.world_size, file=loaded.job_file)
        except ConfigError as error:
            for problem in error.problems:
                told = replace(problem, what=f"task {number}: {problem.what}")
                problems.setdefault(f"{problem}", told)
    if problems:
        raise ConfigError(list(problems.values()))


def plan_rows(spec: RunSpec) -> list[tuple[str, str]]:
    """(word, text) of what is particular to a sweep, for the plan that is shown."""
    from cfe_hpc.config.sweep_rules import read_tasks

    assert spec.job.sweep is not None
    tasks = read_tasks(spec.job.sweep)
    axes = " x ".join(axis.key if axis.draw else f"{axis.key} ({len(axis.values)})" for axis in tasks.axes)
    rows = [("sweep", f"{tasks.tasks} tasks, {tasks.mode}: {axes}")]
    for array in _arrays(spec, tasks.tasks):
        rows.append(("array", f"tasks {array.tasks[0]} to {array.tasks[-1]}: sbatch {array.option}"))
    return rows


def _arrays(spec: RunSpec, number: int) -> list[Any]:
    if spec.site.scheduler != "slurm":
        return []
    from cfe_hpc.launch.arrays import array_max, arrays

    assert spec.job.sweep is not None
    return arrays(range(number), array_max=array_max(spec), max_parallel=spec.job.sweep.max_parallel)


def show(args: argparse.Namespace, planned: Plan, spec: RunSpec, folder: RunFolder, script: str) -> None:
    """The JSON document of a dry run."""
    from cfe_hpc.config.sweep_rules import read_tasks

    assert spec.job.sweep is not None
    number = read_tasks(spec.job.sweep).tasks
    document = {
        "sweep_id": folder.run_id,
        "run_dir": str(folder.path),
        "job_id": None,
        "tasks": number,
        "arrays": [array.option for array in _arrays(spec, number)],
        "site": spec.site.name,
        "partition": planned.partition,
    }
    plan_shown = planned.model_dump(mode="json")
    common.print_json({**document, "dry_run": True, "plan": plan_shown, "script": script})


def tell(args: argparse.Namespace, submitted: Submitted) -> None:
    """Print what was sent."""
    from cfe_hpc.config.tasks import Tasks
    from cfe_hpc.launch.jobs import all_jobs

    folder, spec = submitted.folder, submitted.spec
    jobs = [str(job["job_id"]) for job in all_jobs(folder)]
    number = Tasks.read(folder.sweep_json).tasks
    if args.json:
        document = {
            "sweep_id": folder.run_id,
            "run_dir": str(folder.path),
            "job_id": jobs[0],
            "tasks": number,
            "job_ids": jobs,
            "site": spec.site.name,
            "partition": spec.plan.partition,
            "nodes": spec.plan.nodes,
            "world_size": spec.plan.world_size,
        }
        common.print_json(document)
        sys.stdout.flush()
    else:
        print(f"{folder.run_id}  {number} tasks, job {' '.join(jobs)}  {folder.path}", flush=True)


def wait(submitted: Submitted) -> int:
    """Follow the sweep until every task has ended or is held; 0 when all have completed."""
    from cfe_hpc.cli.sweep_status import read
    from cfe_hpc.reports.sweep import counts

    gc.enable()
    sweep, told = submitted.folder, ""
    try:
        while True:
            tasks, _ = read(sweep, brief=True)
            number = counts(tasks)
            text = ", ".join(f"{count} {state}" for state, count in number.items())
            if text != told:
                print(f"{sweep.run_id}: {text}", file=sys.stderr, flush=True)
            told = text
            if all(state in _ENDED for state in number):
                return 0 if list(number) == ["COMPLETED"] else 1
            time.sleep(_LOOK_EVERY_S)
    except KeyboardInterrupt:
        run_id = sweep.run_id
        print(f"\n{run_id} goes on; see `cfe-hpc status {run_id}`, end it with `cfe-hpc cancel`", file=sys.stderr)
        return 130
