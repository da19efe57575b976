"""Checks of how attempts end: is there time to save, and do later ones go on?"""

from __future__ import annotations

from collections.abc import Iterator

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.recovery.contract import fits, time_to_save_s
from cfe_hpc.recovery.measured import need_s, signal_lead_s
from cfe_hpc.units import format_duration, format_seconds

__all__ = [
    "elastic_batch",
    "elastic_local",
    "lead_short",
    "nccl_signal",
    "no_requeue",
    "no_time_limit",
    "preemption_cancels",
    "preemption_contract",
    "short_grace",
    "signal_at_start",
]

SIGNAL_JITTER_S = 60
"""Slurm sends the signal before the time limit up to this much earlier than asked."""


def short_grace(facts: Facts) -> Iterator[Problem]:
    plan, site, measured = facts.plan, facts.site, facts.measured
    room_s, fit = time_to_save_s(plan, site), fits(plan, site, measured)
    if fit or room_s is None or (measured is None and room_s >= plan.signal_lead_s):
        return
    if measured is None:
        what = f"preemption leaves less time to save than the {plan.signal_lead_s} s that the site thinks are needed"
        remedy = "save often, or choose another partition"
    else:
        what = f"a step and a save took {format_seconds(need_s(measured))} in an earlier run: preemption comes sooner"
        remedy = "saves come more often by themselves; or set checkpoint.every"
        if not facts.job.recovery.adapt_saves:
            remedy = "set checkpoint.every, or recovery.adapt_saves = true"
    key = f"site.partitions.{plan.partition}.preemption.grace"
    yield facts.problem(key, what, remedy, format_duration(room_s))


def preemption_contract(facts: Facts) -> Iterator[Problem]:
    unknown = [key for key in ("version", "proctrack") if getattr(facts.site.slurm, key) is None]
    if facts.on_slurm and facts.plan.preemption.ends_attempts and unknown:
        what = f"what Slurm does to a preempted job here is not fully known: {' and '.join(unknown)} not set"
        remedy = f"`cfe-hpc sites check {facts.site.name}` on a login node tells"
        yield facts.problem(f"site.slurm.{unknown[0]}", what, remedy)


def no_requeue(facts: Facts) -> Iterator[Problem]:
    if facts.site.slurm.job_requeue is False:
        what = "this cluster requeues only jobs that ask for it, as all of cfe_hpc's do"
        remedy = "nothing to do; where the site takes that back, a new job goes on in the same run folder"
        yield facts.problem("site.slurm.job_requeue", what, remedy, False)


def preemption_cancels(facts: Facts) -> Iterator[Problem]:
    if facts.plan.preemption.mode == "cancel":
        key = f"site.partitions.{facts.plan.partition}.preemption.mode"
        what = "a preempted job is cancelled: the run goes on as a new job in the same run folder"
        yield facts.problem(key, what, "nothing to do: the job id changes, the run id stays", "cancel")


def elastic_batch(facts: Facts) -> Iterator[Problem]:
    plan, params = facts.plan, facts.params
    if plan.nodes_min is None or params is None:
        return
    unfit = [n for n in range(plan.nodes_min, plan.nodes) if params.global_batch % (n * plan.devices_per_node)]
    if unfit:
        nodes = ", ".join(map(str, unfit))
        what = f"cannot be shared out evenly among the ranks of {nodes} node{'s' if unfit != [1] else ''}"
        remedy = f"use a multiple of all of them times {plan.devices_per_node}, or raise launch.nodes_min"
        yield facts.problem("job.params.global_batch", what, remedy, params.global_batch)


def signal_at_start(facts: Facts) -> Iterator[Problem]:
    plan = facts.plan
    if plan.time_s is not None and facts.on_slurm:
        useful_s = plan.time_s - plan.signal_lead_s - SIGNAL_JITTER_S
        if useful_s <= 0:
            what = f"the signal comes {plan.signal_lead_s} s before the end, and Slurm may send it a minute earlier"
            remedy = f"ask for more than {format_duration(plan.signal_lead_s + SIGNAL_JITTER_S)}"
            yield facts.problem("job.resources.time", what, remedy, format_duration(plan.time_s))


def no_time_limit(facts: Facts) -> Iterator[Problem]:
    if facts.plan.time_s is None and facts.on_slurm:
        what = "no time limit is known, so the scheduler's own default ends each attempt unannounced to the plan"
        yield facts.problem("job.resources.time", what, 'set time, e.g. time = "4h"')


def lead_short(facts: Facts) -> Iterator[Problem]:
    plan, measured = facts.plan, facts.measured
    # Slurm's slack is in the lead that would be right; the plan takes half of the time for it at the most.
    needed_s = 0.0 if measured is None else signal_lead_s(measured) if facts.on_slurm else need_s(measured)
    if plan.time_s is not None and needed_s > plan.signal_lead_s:
        what = (
            f"a step and a save need the signal {format_seconds(needed_s)} before the end, as an earlier run measured"
        )
        remedy = f"ask for more than {format_duration(2 * needed_s)}, so that it can be sent in time"
        yield facts.problem("job.resources.time", what, remedy, format_duration(plan.time_s))


def nccl_signal(facts: Facts) -> Iterator[Problem]:
    if facts.plan.signal == "USR1" and facts.plan.accelerator == "cuda" and facts.on_slurm:
        what, remedy = "NCCL uses this signal itself", 'set signal = "USR2"'
        yield facts.problem("site.slurm.signal", what, remedy, "USR1")


def elastic_local(facts: Facts) -> Iterator[Problem]:
    if facts.plan.nodes_min is not None and not facts.on_slurm:
        what, remedy = "attempts on this machine always have all nodes", "nothing to do: it counts on Slurm"
        yield facts.problem("job.launch.nodes_min", what, remedy, facts.plan.nodes_min)
