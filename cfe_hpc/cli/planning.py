"""What `check` says of memory, start and cost, and of other places to run a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import Plan
    from cfe_hpc.launch.planner.memory import MemoryEstimate
    from cfe_hpc.launch.planner.proposals import Proposal
    from cfe_hpc.launch.planner.survey import Outlook, Survey

__all__ = ["outlook_rows", "table"]


def outlook_rows(loaded: Loaded, planned: Plan, outlook: Outlook) -> list[tuple[str, str]]:
    """(word, what it says) of the job's memory, start and cost."""
    from cfe_hpc.launch.planner.survey import price_text, start_text

    rows = [("estimate", _memory_text(loaded, planned, outlook.memory))]
    if loaded.site.scheduler == "slurm":
        rows.append(("start", start_text(outlook.own, outlook)))
    price = price_text(outlook.own, loaded)
    if price:
        rows.append(("cost", f"{price} for one full attempt"))
    return rows


def table(survey: Survey, loaded: Loaded) -> list[str]:
    """Every way to run the job, a line each, the best first; what cannot be says why, and what to do."""
    from cfe_hpc.launch.planner.proposals import job_changes
    from cfe_hpc.launch.planner.survey import price_text, start_text

    rows = [("partition", "nodes x devices", "time", "cost", "start")]
    for proposal in survey.proposals:
        start = start_text(proposal, survey)
        if proposal.changes:
            start += f", with {job_changes(proposal.changes)}"
        rows.append((proposal.partition, *_shape(proposal), price_text(proposal, loaded), start))
    shown = [column for column in range(4) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in shown}
    lines = ["  ".join([*(row[column].ljust(widths[column]) for column in shown), row[4]]) for row in rows]
    for index, proposal in reversed(list(enumerate(survey.proposals))):
        lines[index + 2 : index + 2] = [f"    {obstacle}" for obstacle in proposal.obstacles]
    return lines


def _shape(proposal: Proposal) -> tuple[str, str]:
    from cfe_hpc.units import format_duration

    if proposal.plan is None:
        return "", ""
    time_s = proposal.plan.time_s
    shape = f"{proposal.plan.nodes} x {proposal.plan.devices_per_node}"
    return shape, "no limit" if time_s is None else format_duration(time_s)


def _memory_text(loaded: Loaded, planned: Plan, estimate: MemoryEstimate | None) -> str:
    from cfe_hpc.units import format_count, format_size

    if estimate is None:
        return 'memory is not known: resources.model_parameters, e.g. "7B", tells the model\'s size'
    hardware = loaded.site.hardware[loaded.site.partitions[planned.partition].hardware]
    texts = []
    if estimate.device_bytes:
        of = "" if hardware.device_memory is None else f" of {format_size(hardware.device_memory)}"
        texts.append(f"{format_size(estimate.device_bytes)}{of} on each device")
    there = planned.memory_bytes or hardware.memory
    texts.append(f"{format_size(estimate.node_bytes)} of {format_size(there)} on each node")
    texts.append(f"{format_size(estimate.checkpoint_bytes)} a checkpoint")
    left_out = "" if estimate.complete else ", without activations"
    return f"{', '.join(texts)}; {format_count(estimate.parameters)} parameters{left_out}"
