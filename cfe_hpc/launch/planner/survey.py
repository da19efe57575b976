"""The planner's answers for `check` and `submit --partition auto`: what there is to choose, and what is best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan, RunSpec
from cfe_hpc.errors import ImpossibleError, Problem, SchedulerError
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.plan import AUTO
from cfe_hpc.launch.planner.asking import Answer, ask
from cfe_hpc.launch.planner.facts import Facts
from cfe_hpc.launch.planner.memory import MemoryEstimate, estimate
from cfe_hpc.launch.planner.proposals import SOON_S, Proposal, adapted, job_changes, judged, proposals
from cfe_hpc.launch.planner.reading import read_facts
from cfe_hpc.launch.provenance import WorkTree
from cfe_hpc.launch.submission import preview
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import format_duration

__all__ = [
    "Outlook",
    "Survey",
    "best",
    "chooses",
    "outlook",
    "price_text",
    "problems",
    "question_of",
    "settle",
    "settled_on",
    "start_text",
    "survey_all",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found out about a job.

    Attributes:
        proposals: the best first.
        unasked: why the live Slurm was not asked; "" when it was.
        now_s: when, in seconds since the epoch.
    """

    proposals: tuple[Proposal, ...]
    unasked: str
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What awaits a job as planned.

    Attributes:
        own: the job in its partition.
        others: every way to run it; None when nobody asked, and there is no need.
    """

    memory: MemoryEstimate | None
    own: Proposal
    others: Survey | None
    unasked: str
    now_s: float

    def as_json(self) -> dict[str, Any]:
        """Keys `cost memory start unasked proposals`."""
        others = self.others
        return {
            "cost": self.own.cost,
            "memory": None if self.memory is None else self.memory.as_json(),
            "start": self.own.as_json(self.now_s),
            "unasked": self.unasked or None,
            "proposals": None if others is None else [each.as_json(others.now_s) for each in others.proposals],
        }


def chooses(loaded: Loaded) -> bool:
    """Whether the job leaves its partition to the planner."""
    return loaded.job.resources.partition == AUTO and AUTO not in loaded.site.partitions


def survey_all(loaded: Loaded, work_tree: WorkTree) -> Survey:
    """Every way to run the job at its site. Asks Slurm a bounded number of questions; submits nothing."""
    facts, question, unasked = _slurm(loaded, work_tree)
    now_s = time.time()
    found = proposals(loaded, facts=facts, ask=question, now_s=now_s)
    return Survey(proposals=tuple(found), unasked=unasked, now_s=now_s)


def outlook(loaded: Loaded, planned: Plan, work_tree: WorkTree, others: Survey | None = None) -> Outlook:
    """What awaits the job as planned; and the other ways to run it, where it would not start soon.

    Args:
        others: what `survey_all` has found already.
    """
    if others is None:
        facts, question, unasked = _slurm(loaded, work_tree)
        now_s = time.time()
        own = judged(loaded, planned.partition, facts=facts, ask=question or _nobody, now_s=now_s)
        late = own.start_s is None or own.start_s > now_s + SOON_S
        if late and facts is not None:
            found = proposals(loaded, facts=facts, ask=question, now_s=now_s)
            others = Survey(proposals=tuple(found), unasked=unasked, now_s=now_s)
    else:
        unasked, now_s = others.unasked, others.now_s
        own = next(each for each in others.proposals if each.partition == planned.partition and not each.changes)
    return Outlook(memory=estimate(loaded.job, planned), own=own, others=others, unasked=unasked, now_s=now_s)


def best(survey: Survey, loaded: Loaded) -> Proposal:
    """The best way to run the job as it is: only the partition is chosen, never another time or shape.

    Raises:
        ImpossibleError: there is none; holds what stands against each, and what would do.
    """
    for proposal in survey.proposals:
        if proposal.possible and not proposal.changes:
            return proposal
    # What is wrong everywhere alike, an account for instance, is told once.
    told = {each.obstacles[0].what: each for each in reversed(survey.proposals) if each.obstacles}
    distinct = [each for each in survey.proposals if each in told.values()]
    found = [problem for proposal in distinct for problem in problems(proposal, loaded)[:1]]
    changed = next((proposal for proposal in survey.proposals if proposal.possible), None)
    if changed is not None:
        remedy = f"partition {changed.partition} would take it with {job_changes(changed.changes)}"
        found[0] = replace(found[0], remedy=remedy)
    raise ImpossibleError(found)


_KEYS = {"MaxTime": "time", "MaxNodes": "nodes", "MinNodes": "nodes", "nodes": "nodes", "GRES": "devices_per_node",
         "cores": "cpus_per_device", "memory per node": "memory", "account": "account", "QOS": "qos",
         "features": "constraint"}  # fmt: skip
"""The key of `[resources]` to look at, by the limit; `partition` for others."""


def problems(proposal: Proposal, loaded: Loaded) -> list[Problem]:
    """What forbids the job there for ever, as lines of an error report; none when it may start."""
    found = []
    for obstacle in proposal.obstacles:
        if obstacle.for_ever:
            key = f"resources.{_KEYS.get(obstacle.limit, 'partition')}"
            origin = loaded.origins.get(f"job.{key}", "default")
            what = f"would never start in partition {proposal.partition} [{obstacle.reason}]: {obstacle.what}"
            file = loaded.job_file if origin == "default" else origin
            found.append(Problem(file=file, key=key, what=what, remedy=obstacle.remedy))
    return found


def settle(loaded: Loaded, work_tree: WorkTree) -> tuple[Loaded, str]:
    """The job with its partition chosen where it asks for "auto", and why, in a line.

    Raises:
        ImpossibleError: as `best`.
    """
    survey = survey_all(loaded, work_tree)
    chosen = best(survey, loaded)
    others = [each for each in survey.proposals if each.possible and not each.changes and each is not chosen]
    text = f"partition {chosen.partition}: start {start_text(chosen, survey)}"
    price = price_text(chosen, loaded)
    if price:
        text += f", {price} for a full attempt"
    if others:
        text += f"; next best is {others[0].partition}: start {start_text(others[0], survey)}"
    return settled_on(chosen, loaded), text


def settled_on(chosen: Proposal, loaded: Loaded) -> Loaded:
    """The job with that partition."""
    return adapted(loaded, partition=chosen.partition)


def price_text(proposal: Proposal, loaded: Loaded) -> str:
    """What a full attempt costs, for people; "" when nobody knows."""
    if proposal.cost is not None:
        return f"{proposal.cost:.2f} {loaded.site.cost.currency}".rstrip()
    return "" if proposal.billing_hours is None else f"{proposal.billing_hours:.4g} billing hours"


def start_text(proposal: Proposal, survey: Survey | Outlook) -> str:
    """When a job would start, for people."""
    if not proposal.possible:
        return f"never ({proposal.reason(survey.now_s)})"
    if proposal.start_s is None:
        if proposal.obstacles:
            return f"not yet ({proposal.reason(survey.now_s)}), and nobody knows when"
        return f"not known ({survey.unasked})" if survey.unasked else "not known"
    wait_s = proposal.start_s - survey.now_s
    if wait_s <= 60:
        return "now"
    when = datetime.fromtimestamp(proposal.start_s).strftime("%Y-%m-%d %H:%M")
    return f"{when}, in {format_duration(60 * round(wait_s / 60))} ({proposal.reason(survey.now_s)})"


def _nobody(planned: Plan) -> Answer | None:
    return None


def _slurm(loaded: Loaded, work_tree: WorkTree) -> tuple[Facts | None, Callable[[Plan], Answer] | None, str]:
    """(limits, question, why there is neither) of the live Slurm, if it is the site's."""
    if loaded.site.scheduler != "slurm":
        return None, None, "no scheduler there"
    try:
        facts = read_facts()
    except SchedulerError as error:
        return None, None, f"Slurm was not asked: {error}"
    queues = {partition.queue_of(name) for name, partition in loaded.site.partitions.items()}
    if not queues.intersection({*facts.partitions, ""}):
        return None, None, f"Slurm was not asked: the one here has no partition of site {loaded.site.name}"
    return facts, question_of(loaded, work_tree), ""


def question_of(loaded: Loaded, work_tree: WorkTree) -> Callable[[Plan], Answer]:
    """What asks Slurm about the job, planned in one way or another: it is given the script that would be sent."""
    frozen: list[tuple[RunSpec, RunFolder]] = []

    def question(planned: Plan) -> Answer:
        if not frozen:  # all candidates differ in their plan alone, and a preview takes a while
            spec, folder, script = preview(loaded, planned, work_tree)
            frozen.append((spec, folder))
            return ask(script)
        spec, folder = frozen[0]
        return ask(backend_for("slurm").preview(spec.model_copy(update={"plan": planned}), folder))

    return question
