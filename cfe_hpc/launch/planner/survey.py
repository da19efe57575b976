"""The planner's answers for `check` and `submit --partition auto`: what there is to choose, and what is best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan, RunSpec
from cfe_hpc.errors import ImpossibleError, Problem, SchedulerError
from cfe_hpc.launch.backend import backend_for
from cfe_hpc.launch.planner.asking import Answer, ask
from cfe_hpc.launch.planner.facts import Facts, read_facts
from cfe_hpc.launch.planner.proposals import Proposal, adapted, judged, proposals
from cfe_hpc.launch.provenance import WorkTree
from cfe_hpc.launch.submission import preview
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import format_duration

__all__ = ["Survey", "best", "settle", "start_text", "survey_all", "survey_one"]


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


def survey_all(loaded: Loaded, work_tree: WorkTree) -> Survey:
    """Every way to run the job at its site. Asks Slurm a bounded number of questions; submits nothing."""
    facts, question, unasked = _slurm(loaded, work_tree)
    now_s = time.time()
    found = proposals(loaded, facts=facts, ask=question, now_s=now_s)
    return Survey(proposals=tuple(found), unasked=unasked, now_s=now_s)


def survey_one(loaded: Loaded, planned: Plan, work_tree: WorkTree) -> Survey:
    """The job as planned, alone."""
    facts, question, unasked = _slurm(loaded, work_tree)
    now_s = time.time()
    found = judged(loaded, planned.partition, facts=facts, ask=question or _nobody, now_s=now_s)
    return Survey(proposals=(found,), unasked=unasked, now_s=now_s)


def best(survey: Survey, loaded: Loaded) -> Proposal:
    """The best way to run the job as it is: only the partition is chosen, never another time or shape.

    Raises:
        ImpossibleError: there is none; holds what stands against each, and what would do.
    """
    for proposal in survey.proposals:
        if proposal.possible and not proposal.changes:
            return proposal
    origin = loaded.origins.get("job.resources.partition", loaded.job_file)
    raise ImpossibleError(
        Problem(
            file=origin,
            key="resources.partition",
            what=f"partition {proposal.partition} cannot: {proposal.obstacles[0].what}",
            remedy=proposal.obstacles[0].remedy,
        )
        for proposal in survey.proposals
        if not proposal.possible and proposal.obstacles
    )


def settle(loaded: Loaded, work_tree: WorkTree) -> tuple[Loaded, str]:
    """The job with its partition chosen where it asks for "auto", and why, in a line.

    Raises:
        ImpossibleError: as `best`.
    """
    survey = survey_all(loaded, work_tree)
    chosen = best(survey, loaded)
    others = [each for each in survey.proposals if each.possible and not each.changes and each is not chosen]
    text = f"partition {chosen.partition}: {start_text(chosen, survey)}"
    if chosen.cost is not None:
        text += f", {chosen.cost:.2f} {loaded.site.cost.currency}".rstrip() + " for a full attempt"
    if others:
        text += f"; next best is {others[0].partition}: {start_text(others[0], survey)}"
    return adapted(loaded, partition=chosen.partition), text


def start_text(proposal: Proposal, survey: Survey) -> str:
    """When a job would start, for people."""
    if not proposal.possible:
        return f"never ({proposal.reason(survey.now_s)})"
    if proposal.start_s is None:
        if proposal.obstacles:
            return f"not yet ({proposal.reason(survey.now_s)}), and nobody knows when"
        return f"start not known ({survey.unasked})" if survey.unasked else "start not known"
    wait_s = proposal.start_s - survey.now_s
    if wait_s <= 60:
        return "starts now"
    when = datetime.fromtimestamp(proposal.start_s).strftime("%Y-%m-%d %H:%M")
    return f"starts {when}, in {format_duration(60 * round(wait_s / 60))} ({proposal.reason(survey.now_s)})"


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
    frozen: list[tuple[RunSpec, RunFolder]] = []

    def question(planned: Plan) -> Answer:
        if not frozen:  # all candidates differ in their plan alone, and a preview takes a while
            spec, folder, script = preview(loaded, planned, work_tree)
            frozen.append((spec, folder))
            return ask(script)
        spec, folder = frozen[0]
        return ask(backend_for("slurm").preview(spec.model_copy(update={"plan": planned}), folder))

    return facts, question, ""
