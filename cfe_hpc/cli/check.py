"""`check JOB`: the plan, every check, and what Slurm says of its start; nothing is sent and nothing written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common
from cfe_hpc.errors import ConfigError, ImpossibleError, PipelineError

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import Plan
    from cfe_hpc.launch.checks.checking import Finding
    from cfe_hpc.launch.planner.survey import Outlook, Survey
    from cfe_hpc.recovery.measured import Measured

__all__ = ["configure", "plan_rows", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "Read a job for a site, plan it, and check it; say what memory it takes, when it would start, what it costs, "
        "and what a preemption does to it there. `--partition auto` compares all partitions. Each finding ends in "
        "the id of its check, which docs/checks.md explains. Exit codes: 0 good (warnings included), 1 a check found "
        "an error, 2 job or site is wrong, 4 the job could never run there."
    )
    common.add_job_arguments(parser)
    common.add_sweep_arguments(parser)
    common.add_partition_argument(parser)
    common.add_ignore_argument(parser)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print plan and findings, of every stage where the job has some."""
    try:
        return _run(args, common.print_json)
    except PipelineError:
        from cfe_hpc.cli.check_pipeline import check_stages

        return check_stages(args, _run)


def _run(args: argparse.Namespace, print_json: Callable[[dict[str, Any]], None]) -> int:
    from cfe_hpc.launch.checks.checking import check
    from cfe_hpc.launch.history import plan_with_history
    from cfe_hpc.launch.planner import survey as planner
    from cfe_hpc.launch.provenance import WorkTree

    loaded: Loaded | None = None
    others: Survey | None = None
    work_tree = WorkTree(Path.cwd())
    try:
        loaded = common.of_one_run(common.load_job(args))
        if planner.chooses(loaded):
            others = planner.survey_all(loaded, work_tree)
            loaded = planner.settled_on(planner.best(others, loaded), loaded)
        planned, measured = plan_with_history(loaded)
        findings = check(loaded, planned, measured=measured)
    except (ConfigError, ImpossibleError) as error:
        if args.json:
            print_json(_refused(loaded, error))
        raise
    outlook = planner.outlook(loaded, planned, work_tree, others)
    if args.json:
        print_json(_document(loaded, planned, measured, outlook, findings))
    else:
        _print(loaded, planned, measured, outlook, findings)
    if any(finding.severity == "error" for finding in findings):
        return 1  # the planner would say the same once more
    problems = planner.problems(outlook.own, loaded)
    if problems:
        raise ImpossibleError(problems)
    return 0


def _document(
    loaded: Loaded, planned: Plan, measured: Measured | None, outlook: Outlook, findings: list[Finding]
) -> dict[str, Any]:
    from dataclasses import asdict

    from cfe_hpc.recovery.contract import sentence

    return {
        "job": loaded.job.name,
        "job_file": loaded.job_file,
        "site": loaded.site.name,
        "site_file": loaded.site_file,
        "plan": planned.model_dump(mode="json"),
        "preemption": sentence(planned, loaded.site, measured),
        "measured": None if measured is None else asdict(measured),
        **outlook.as_json(),
        "findings": [finding.as_json() for finding in findings],
    }


def _refused(loaded: Loaded | None, error: ConfigError | ImpossibleError) -> dict[str, Any]:
    """What `--json` prints of a job that cannot be read or planned: the same keys, null where nothing is known."""
    from cfe_hpc.launch.checks.checking import findings_of

    known = "job job_file site site_file plan preemption measured cost memory start unasked proposals"
    document: dict[str, Any] = dict.fromkeys(known.split())
    if loaded is not None:
        document |= {"job": loaded.job.name, "job_file": loaded.job_file}
        document |= {"site": loaded.site.name, "site_file": loaded.site_file}
    return {**document, "findings": [finding.as_json() for finding in findings_of(error)]}


def plan_rows(loaded: Loaded, planned: Plan, measured: Measured | None) -> list[tuple[str, str]]:
    """The plan for people: (word, what it says)."""
    import shlex

    from cfe_hpc.config.template import fill_in
    from cfe_hpc.recovery.contract import sentence
    from cfe_hpc.units import format_duration, format_size

    command = shlex.join(fill_in(word, loaded.job.params) for word in loaded.job.command or ())
    time = "no limit" if planned.time_s is None else f"{format_duration(planned.time_s)} for one attempt"
    lead = "" if planned.time_s is None else f"; {planned.signal} {planned.signal_lead_s} s before its end"
    nodes = "1 node" if planned.nodes == 1 else f"{planned.nodes} nodes"
    kind = f"{planned.accelerator} device" + ("s" if planned.devices_per_node > 1 else "")
    return [
        ("job", f"{loaded.job.name!r} ({loaded.job_file})"),
        ("runs", loaded.job.entry or command),
        ("site", f"{loaded.site.name} ({loaded.site_file}), partition {planned.partition}"),
        ("ranks", f"{planned.world_size}, on {nodes} with {planned.devices_per_node} {kind}"),
        ("cores", f"{planned.cpus_per_device} for each rank"),
        (
            "memory",
            "the site's default" if planned.memory_bytes is None else f"{format_size(planned.memory_bytes)} a node",
        ),
        ("time", time + lead),
        ("preemption", sentence(planned, loaded.site, measured)),
    ]


def _print(loaded: Loaded, planned: Plan, measured: Measured | None, outlook: Outlook, findings: list[Finding]) -> None:
    from cfe_hpc.cli.planning import outlook_rows, table

    for word, text in [*plan_rows(loaded, planned, measured), *outlook_rows(loaded, planned, outlook)]:
        print(f"{word:<12}{text}".replace("\n", "\\n"))
    if outlook.others is not None:
        print()
        for line in table(outlook.others, loaded):
            print(line)
    print()
    for finding in findings:
        print(f"{finding.severity}: {finding.problem} [{finding.id}]")
    if not findings:
        print("nothing to remark")
