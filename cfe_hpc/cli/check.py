"""`check JOB`: the plan and every check, without a scheduler; nothing is sent and nothing written."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common
from cfe_hpc.errors import ConfigError, ImpossibleError

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import Plan
    from cfe_hpc.launch.checks.checking import Finding
    from cfe_hpc.recovery.measured import Measured

__all__ = ["configure", "plan_rows", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "Read a job for a site, plan it, and check it; say what a preemption does to it there. Each finding ends in "
        "the id of its check, which docs/checks.md explains. Exit codes: 0 good (warnings included), 1 a check found "
        "an error, 2 job or site is wrong, 4 the job could never run there."
    )
    common.add_job_arguments(parser)
    common.add_ignore_argument(parser)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print plan and findings."""
    from cfe_hpc.launch.checks.checking import check
    from cfe_hpc.launch.checks.costs import cost_of_attempt
    from cfe_hpc.launch.history import plan_with_history
    from cfe_hpc.recovery.contract import sentence

    loaded: Loaded | None = None
    try:
        loaded = common.load_job(args)
        planned, measured = plan_with_history(loaded)
        findings = check(loaded, planned, measured=measured)
    except (ConfigError, ImpossibleError) as error:
        if args.json:
            common.print_json(_refused(loaded, error))
        raise
    cost = cost_of_attempt(loaded, planned)
    if args.json:
        from dataclasses import asdict

        common.print_json(
            {
                "job": loaded.job.name,
                "job_file": loaded.job_file,
                "site": loaded.site.name,
                "site_file": loaded.site_file,
                "plan": planned.model_dump(mode="json"),
                "preemption": sentence(planned, loaded.site, measured),
                "measured": None if measured is None else asdict(measured),
                "cost": cost,
                "findings": [finding.as_json() for finding in findings],
            }
        )
    else:
        _print(loaded, planned, measured, cost, findings)
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _refused(loaded: Loaded | None, error: ConfigError | ImpossibleError) -> dict[str, Any]:
    """What `--json` prints of a job that cannot be read or planned: the same keys, null where nothing is known."""
    from cfe_hpc.launch.checks.checking import findings_of

    keys = ("job", "job_file", "site", "site_file", "plan", "preemption", "measured", "cost")
    document: dict[str, Any] = dict.fromkeys(keys)
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


def _print(
    loaded: Loaded, planned: Plan, measured: Measured | None, cost: float | None, findings: list[Finding]
) -> None:
    rows = plan_rows(loaded, planned, measured)
    if cost is not None:
        rows.append(("cost", f"{cost:.2f} for one full attempt"))
    for word, text in rows:
        print(f"{word:<12}{text}".replace("\n", "\\n"))
    print()
    for finding in findings:
        print(f"{finding.severity}: {finding.problem} [{finding.id}]")
    if not findings:
        print("nothing to remark")
