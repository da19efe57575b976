"""Arguments that several verbs share, and what they mean. Heavy imports wait until an argument is used."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from cfe_hpc.config.load import Loaded
    from cfe_hpc.launch.provenance import WorkTree
    from cfe_hpc.runfolder import RunFolder

__all__ = [
    "add_ignore_argument",
    "add_job_arguments",
    "add_json_argument",
    "add_partition_argument",
    "add_run_argument",
    "add_site_argument",
    "add_snapshot_argument",
    "add_sweep_arguments",
    "find_run",
    "ignoring",
    "load_job",
    "of_one_run",
    "print_json",
    "roots",
    "with_partition",
]


def add_site_argument(parser: argparse.ArgumentParser) -> None:
    """`--site`: `args.site`, None when not given."""
    parser.add_argument(
        "--site",
        metavar="S",
        help="site profile: a name (see `cfe-hpc sites list`) or a path; $CFE_SITE or local when left out",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json`: `args.json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")


def add_job_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """`JOB`, `--site`, `--set`, `--stage`: `args.job`, `args.site`, `args.set`, `args.stage`. Read with `load_job`."""
    nargs = "?" if optional else None
    parser.add_argument(
        "job", metavar="JOB", nargs=nargs, help="job file: a path, or the name of one in jobs/ or shipped"
    )
    add_site_argument(parser)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a value, e.g. resources.nodes=4, params.lr=1e-3 or site.storage.runs_root=/scratch/runs; "
        "may be given again",
    )
    parser.add_argument("--stage", metavar="NAME", help="this stage alone, of a job that has stages")


def add_partition_argument(parser: argparse.ArgumentParser) -> None:
    """`--partition`, beside `add_job_arguments`: a short way to `--set resources.partition=P`."""
    parser.add_argument(
        "--partition",
        dest="set",
        metavar="P",
        action="append",
        type=lambda name: f"resources.partition={json.dumps(name)}",
        help="the partition to run in; `auto` asks Slurm where the job would start first and at what price, and takes "
        "the best, see docs/planning.md",
    )


def add_ignore_argument(parser: argparse.ArgumentParser) -> None:
    """`--ignore`, beside `add_job_arguments`: `load_job` adds it to the job's own `checks.ignore`."""
    parser.add_argument(
        "--ignore",
        metavar="ID",
        action="append",
        default=[],
        help="a check whose findings do not matter here, see docs/checks.md; may be given again",
    )


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """`--sweep`, `--max-parallel`: `args.sweep`, `args.max_parallel`. Read with `load_job`."""
    parser.add_argument(
        "--sweep",
        metavar="KEY=V1,V2",
        action="append",
        default=[],
        help="run the job once for each value, e.g. params.lr=1e-3,1e-4 or params.seed={range=[0,10]}; given again, "
        "for every combination; --set sweep.mode=zip or random for another way",
    )
    parser.add_argument(
        "--max-parallel", metavar="N", type=int, help="let at most so many tasks of the sweep run at once"
    )


def add_snapshot_argument(parser: argparse.ArgumentParser) -> None:
    """`--no-snapshot`, beside `add_job_arguments`: short for `--set snapshot.mode=off`."""
    parser.add_argument(
        "--no-snapshot",
        dest="set",
        action="append_const",
        const='snapshot.mode="off"',
        help="start in the folder itself, as it is by then, and not in a copy of its code as it is now",
    )


def add_run_argument(parser: argparse.ArgumentParser, *, optional: bool = False, several: bool = False) -> None:
    """`RUN`: `args.run`, a text (a list of them with `several`), and `--site`. Read with `find_run`."""
    nargs = "*" if several and optional else "+" if several else "?" if optional else None
    parser.add_argument(
        "run", metavar="RUN", nargs=nargs, help="a run id, a unique prefix of one, a run folder, or a job id"
    )
    parser.add_argument(
        "--site",
        metavar="S",
        help="look under this site's runs root alone: a name or a path; under those of all profiles when left out",
    )


def load_job(args: argparse.Namespace) -> Loaded:
    """The job of `add_job_arguments`, and of `add_ignore_argument` where the verb has it.

    Raises:
        ConfigError: holds every problem of job, site, environment and --set; or of --ignore.
        PipelineError: the job has stages, and --stage names none.
    """
    from cfe_hpc.config.load import load, sweep_table

    sweep = sweep_table(getattr(args, "sweep", []), getattr(args, "max_parallel", None))
    loaded = load(args.job, args.site, args.set, os.environ, sweep=sweep, stage=args.stage)
    return ignoring(loaded, getattr(args, "ignore", []))


def ignoring(loaded: Loaded, ids: list[str]) -> Loaded:
    """The job with these checks of --ignore added to its own. Raises ConfigError for an unknown one."""
    if not ids:
        return loaded
    from dataclasses import replace

    from cfe_hpc.config.checks import ignore_problems
    from cfe_hpc.errors import ConfigError

    problems = list(ignore_problems(ids, file="--ignore", key=""))
    if problems:
        raise ConfigError(problems)
    checks = loaded.job.checks.model_copy(update={"ignore": [*loaded.job.checks.ignore, *ids]})
    job = loaded.job.model_copy(update={"checks": checks})
    return replace(loaded, job=job, origins={**loaded.origins, "job.checks.ignore": "--ignore"})


def with_partition(loaded: Loaded, work_tree: WorkTree) -> Loaded:
    """The job with its partition chosen where it asks for `auto`; says on standard error which and why.

    Raises:
        ImpossibleError: no partition can take it.
    """
    from cfe_hpc.launch.plan import AUTO

    if loaded.job.resources.partition != AUTO:
        return loaded
    from cfe_hpc.launch.planner.survey import chooses, settle

    if not chooses(loaded):  # the site has one of that name
        return loaded
    settled, why = settle(loaded, work_tree)
    print(why, file=sys.stderr)
    return settled


def roots(args: argparse.Namespace) -> list[Path]:
    """The runs roots to look in: of `--site` when given, else of every profile known."""
    from cfe_hpc.reports.find import runs_roots

    return runs_roots(args.site, os.environ)


def of_one_run(loaded: Loaded) -> Loaded:
    """The job, or of a sweep the first task's, one of `tasks`: the sweep's own may lack what its axes give."""
    if loaded.job.sweep is None:
        return loaded
    from dataclasses import replace

    from cfe_hpc.config.sweep_rules import read_tasks, task_job

    tasks = read_tasks(loaded.job.sweep)
    return replace(loaded, job=task_job(loaded.job, tasks, 0), tasks=tasks.tasks)


def find_run(args: argparse.Namespace, ref: str | None = None, *, sweep: bool = False) -> RunFolder:
    """The run of `add_run_argument`, or the one that `ref` means.

    Args:
        sweep: a sweep will do, too; else one of its tasks must be named.

    Raises:
        UsageError: there is none, or several, or it is a sweep.
    """
    from cfe_hpc.reports import find

    folder = find.find_run(args.run if ref is None else ref, roots(args))
    if folder.is_sweep and not sweep:
        from cfe_hpc.errors import UsageError

        raise UsageError(f"{folder.run_id}: is a sweep; name one of its tasks: {folder.run_id}.0")
    return folder


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write("\n")
