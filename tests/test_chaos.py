"""The plan of a chaos campaign follows from its seed, and its oracle sees what is wrong with a run. The campaign's
short part on a real Slurm is among the cases of test_recovery_slurm.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from chaos import __main__ as program
from chaos import oracle, ward
from chaos.kinds import KINDS, kind
from chaos.plan import INTERVAL, STEPS, Fault, RunPlan, plan
from chaos.ward import Delivered
from launching import make_folder, make_spec

from cfe_hpc.config.job import Recovery
from cfe_hpc.files import append_ndjson


def test_the_same_seed_hurts_the_same_runs_in_the_same_order() -> None:
    assert plan(7, 40) == plan(7, 40)
    assert plan(7, 40) != plan(8, 40)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_has_all_faults_and_every_kind_as_often(seed: int) -> None:
    runs = plan(seed, 42)
    times = Counter(fault.kind for run in runs for fault in run.faults)
    assert sum(times.values()) >= 42
    assert set(times) == {each.name for each in KINDS}
    assert max(times.values()) - min(times.values()) <= 3
    for run in runs:
        assert sum(each.node for each in run.kinds) <= 2
        assert run.workload == "training" or not any(each.trains for each in run.kinds)


@pytest.mark.parametrize("seed", range(20))
def test_budgets_are_spent_to_the_last_and_overspent_only_by_the_last_fault(seed: int) -> None:
    for run in plan(seed, 42):
        spent = Counter(each.budget for each in run.kinds if each.budget)
        assert run.budgets == {key: times - (key == run.held_by) for key, times in spent.items()}
        assert run.held_by is None or (run.kinds[-1].budget == run.held_by and run.kinds[-1].holds)
        Recovery.model_validate(run.budgets)


def test_every_kind_can_be_done() -> None:
    assert list(ward.ACTS) == [each.name for each in KINDS]


def test_the_dry_run_prints_the_plan_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--dry-run", "--seed", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(plan(3, 42))


class Hurt:
    """A run folder as a campaign leaves it: one fault, at step 20 of attempt 0."""

    def __init__(self, root: Path, fault: str = "preempt", *, resumed: int = 20, **about: object) -> None:
        self.folder = make_folder(root, make_spec(root))
        self.job_id, self.run_id = "7", self.folder.run_id
        reason = min(kind(fault).reasons, default=None)
        self.note("started", attempt=0)
        self.beats(0, 1, 20)
        if reason:
            self.note("requeued", attempt=0, step=20, reason=reason)
            self.note("started", attempt=1)
            self.note("resumed", attempt=1, step=resumed)
            self.beats(1, resumed + 1, STEPS)
        self.result(state="COMPLETED", final_step=STEPS, metrics={"total": sum(range(STEPS))}, weights_sha256="a")
        faults = (Fault(kind=fault, after=1, rank=0),)
        words = {"number": 0, "workload": "bulky", "beside": False, "faults": faults, "budgets": {}, "held_by": None}
        self.plan = RunPlan(**{**words, **about})
        self.delivered = [Delivered(fault=faults[0], attempt=0, seconds=1.0)]
        self.cluster = SimpleNamespace(job_ids=set)

    @property
    def run(self) -> Hurt:
        return self

    def note(self, name: str, **fields: object) -> None:
        self.folder.append_event(name, **fields)

    def beats(self, attempt: int, first: int, last: int) -> None:
        for step in range(first, last + 1):
            append_ndjson(self.folder.heartbeat_path, {"attempt": attempt, "step": step})

    def result(self, **fields: object) -> None:
        (self.folder.path / "result.json").write_text(json.dumps(fields))

    def events(self, *names: str) -> list[dict]:
        return [event for event in self.folder.events() if event["event"] in names]

    def problems(self, undisturbed: str | None = None) -> list[str]:
        return oracle.problems(self, undisturbed)


def test_a_run_that_ended_as_predicted_has_no_problems(tmp_path: Path) -> None:
    assert Hurt(tmp_path).problems() == []
    assert Hurt(tmp_path, "kill-rank", resumed=20 - INTERVAL).problems() == []
    assert Hurt(tmp_path, "full-disk").problems() == []


def test_steps_lost_beyond_what_a_fault_may_cost_are_a_problem(tmp_path: Path) -> None:
    (graceful,) = Hurt(tmp_path, "preempt", resumed=19).problems()
    assert "1 steps of attempt 0 were lost, where 0 may be" in graceful
    (hard,) = Hurt(tmp_path, "kill-rank", resumed=19 - INTERVAL).problems()
    assert f"where {INTERVAL} may be" in hard


def test_another_end_another_reason_and_other_weights_are_problems(tmp_path: Path) -> None:
    run = Hurt(tmp_path)
    run.result(state="FAILED", final_step=20, reason="RuntimeError: no")
    assert any("is FAILED at step 20 (RuntimeError: no)" in each for each in run.problems())
    run.result(state="COMPLETED", final_step=STEPS, metrics={"total": 1.0})
    assert any("a step was skipped or done twice" in each for each in run.problems())
    trained = Hurt(tmp_path, workload="training")
    assert trained.problems("a") == []
    assert any("weights" in each for each in trained.problems("b"))
    wrong = Hurt(tmp_path, "time-limit")
    wrong.delivered[0].fault = Fault(kind="requeue", after=1, rank=0)
    assert any("was requeued for time_limit, not for requeue_requested" in each for each in wrong.problems())


def test_a_run_must_be_held_by_the_budget_that_its_plan_overspends(tmp_path: Path) -> None:
    run = Hurt(tmp_path, held_by="preemptions")
    assert any("not held by recovery.preemptions" in each for each in run.problems())
    run.result(state="HELD", reason="preemption number 2; the job allows 1 (recovery.preemptions)")
    assert run.problems() == []
    run.result(state="HELD", reason="the same first error twice")
    assert any("not held by recovery.preemptions" in each for each in run.problems())


def test_an_attempt_too_many_a_fault_too_few_and_what_is_left_are_problems(tmp_path: Path) -> None:
    run = Hurt(tmp_path)
    run.delivered.clear()
    assert any("only 0 of 1 faults came" in each for each in run.problems())
    assert any("attempt 0 ended though no fault was to end it" in each for each in run.problems())
    run = Hurt(tmp_path)
    run.cluster.job_ids = lambda: {"7"}
    assert run.problems() == ["job 7 is left in the queue"]
    orphan = subprocess.Popen(
        [sys.executable, "-c", "input()"],
        stdin=subprocess.PIPE,
        env={**os.environ, "CFE_RUN_DIR": str(run.folder.path)},
    )
    try:
        assert oracle.orphans(run.folder.path) == [orphan.pid]
    finally:
        orphan.kill()
        orphan.communicate()
    assert oracle.orphans(run.folder.path) == []


def test_lost_steps_are_those_beyond_what_the_next_attempt_took_up_from(tmp_path: Path) -> None:
    assert oracle.lost_steps(Hurt(tmp_path, resumed=17)) == {0: 3}
