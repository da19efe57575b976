"""A short campaign of tests/chaos, the same in every run; scripts/chaos has the long one."""

from __future__ import annotations

from chaos.campaign import build_data, outcome_of
from chaos.plan import RunPlan, plan
from chaos.ward import Surroundings, Ward
from spine.stage import Stage

# None that takes a minute, hurts the runs of other cases, or needs a cluster of a special kind.
PLANS = plan(19, 6, ["preempt", "kill-rank", "corrupt-shard", "requeue", "nan", "stop-rank"], a_run=3)


def _go_through(stage: Stage, each: RunPlan) -> None:
    data = stage.folder if each.workload == "bulky" else build_data(stage.folder / "data", stage.cluster.env)
    # No weights to compare with: what an undisturbed run comes to is test_spine_slurm's.
    outcome = outcome_of(Ward(stage, each, Surroundings(data=data)), None)
    assert outcome.problems == [], outcome.diagnosis


def a_first_run_ends_as_its_plan_predicts(stage: Stage) -> None:
    _go_through(stage, PLANS[0])


def a_second_run_ends_as_its_plan_predicts(stage: Stage) -> None:
    _go_through(stage, PLANS[1])


CASES = [a_first_run_ends_as_its_plan_predicts, a_second_run_ends_as_its_plan_predicts]
