"""The product's promise on the real Slurm: preempted, out of time and requeued, a run ends as if nothing had happened.

Every engine, both variants and every launcher are disturbed five times each. The runs share one cluster of their own
and go through their troubles at the same time; each has its test.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster
from spine.harness import SMALL, LiveRun, cfe, site_file, training_job

VARIANTS = ("rope", "irope")
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

ENGINES = [("torch", 0), *(("deepspeed", stage) for stage in range(4))]
# How the ranks are started; "joined" is a command that joins the run, "script" a user's own training that does.
LAUNCHES: dict[str, dict[str, Any]] = {
    "srun": {},
    "torchrun": {"launch": {"launcher": "torchrun"}},
    "deepspeed": {"launch": {"launcher": "deepspeed"}},
    "joined": {
        "entry": None,
        "command": [sys.executable, "-c", "import cfe_hpc, entries; entries.paced(cfe_hpc.join())"],
    },
    "script": {"entry": None, "command": [sys.executable, "entries_plain.py"]},
}
Combination = tuple[str, int, str, str, str]
# Each engine once, the variants and launchers in turn, with checkpoints written beside training while it is disturbed
# (undisturbed, training waits for its last one).
SOME: list[Combination] = [
    ("torch", 0, "irope", "beside", "srun"),
    ("deepspeed", 0, "rope", "beside", "torchrun"),
    ("deepspeed", 1, "irope", "beside", "srun"),
    ("deepspeed", 2, "rope", "beside", "joined"),
    ("deepspeed", 3, "irope", "beside", "torchrun"),
    ("torch", 0, "rope", "beside", "script"),
]
ALL: list[Combination] = [
    *(
        (*engine, variant, saves, "srun")
        for saves in ("beside", "at stops")
        for engine in ENGINES
        for variant in VARIANTS
    ),
    *((*engine, "rope", "beside", launch) for launch in ("torchrun", "deepspeed", "joined") for engine in ENGINES),
    SOME[-1],
]
COMBINATIONS = ALL if os.environ.get("CFE_TEST_FULL") else SOME
AT_A_TIME = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small token file that all runs read."""
    folder = tmp_path_factory.mktemp("data")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02d}.txt").write_text(f"the {number} lazy dogs and the quick fox {number * 7919}\n" * 60)
    done = cfe("data", "build", str(folder / "tokens.h5"), str(texts), cwd=folder, env=os.environ)
    assert done.returncode == 0, done.stderr
    return folder / "tokens.h5"


class Fleet:
    """Combinations on one cluster, a few at a time."""

    def __init__(self, root: Path, data: Path, chosen: list[Combination]) -> None:
        self._root, self._data = root, data
        self._cluster = Cluster.start("--nodes", str(4 * AT_A_TIME))
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self.outcomes: dict[Combination, Future[tuple[dict[str, Any], LiveRun]]] = {
            each: self._pool.submit(self._go_through, *each) for each in chosen
        }

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._cluster.stop()

    def _go_through(
        self, kind: str, stage: int, variant: str, saves: str, launch: str
    ) -> tuple[dict[str, Any], LiveRun]:
        folder = self._root / f"{kind}-{stage}-{variant}-{saves.replace(' ', '-')}-{launch}"
        folder.mkdir()
        site = site_file(folder)
        words = {"kind": kind, "zero_stage": stage, "variant": variant, "data": self._data, **LAUNCHES[launch]}
        # Whole nodes each: a preemptor sent for one run must not hit another.
        job = training_job(folder, **words, partition="spot", cpus=8)
        undisturbed = LiveRun.submit(job, site, cwd=folder, env=self._cluster.env)
        if saves == "beside":
            job = training_job(folder, **words, partition="spot", cpus=8, checkpoint={"every_steps": 1, "async": True})
        run = LiveRun.submit(job, site, cwd=folder, env=self._cluster.env, pace_s=0.5)
        for attempt in range(3):
            self._preempt(run, attempt)
        self._run_out_of_time(run, attempt=3)
        run.wait_step(run.step() + 2, attempt=4)
        self._cluster.scontrol("requeue", run.job_id)
        run.wait(lambda: self._cluster.restarts(run.job_id) == 5, 60, "requeued by scontrol")
        run.pace(0)
        self._cluster.resume(run.job_id)
        run.wait_result()
        self._cluster.wait_for_end(run.job_id)
        return undisturbed.wait_result(), run

    def _preempt(self, run: LiveRun, attempt: int) -> None:
        run.wait_step(run.step() + 2, attempt=attempt)
        self._cluster.preempt_once(run.job_id)

    def _run_out_of_time(self, run: LiveRun, attempt: int) -> None:
        run.wait_step(run.step() + 2, attempt=attempt)
        run.pace(2.0)
        started = time.mktime(time.strptime(self._cluster.job(run.job_id)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        limit_min = int((time.time() - started) // 60) + 1
        self._cluster.scontrol("update", f"JobId={run.job_id}", f"TimeLimit={limit_min}")
        run.wait(lambda: self._cluster.restarts(run.job_id) == attempt + 1, 150, "requeued at its time limit")
        run.pace(0.5)
        self._cluster.scontrol("update", f"JobId={run.job_id}", "TimeLimit=20")
        self._cluster.resume(run.job_id)


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Fleet]:
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    mine = [item.callspec.params for item in items if item.module is request.module and hasattr(item, "callspec")]
    chosen = [tuple(each[name] for name in ("kind", "stage", "variant", "saves", "launch")) for each in mine]
    running = Fleet(tmp_path_factory.mktemp("fleet"), data, chosen)
    yield running
    running.close()


@pytest.mark.parametrize(("kind", "stage", "variant", "saves", "launch"), COMBINATIONS)
def test_five_disturbances_change_no_bit(
    fleet: Fleet, kind: str, stage: int, variant: str, saves: str, launch: str
) -> None:
    undisturbed, run = fleet.outcomes[kind, stage, variant, saves, launch].result(timeout=880)
    result = run.folder.result()
    assert result is not None
    assert (result["state"], result["final_step"]) == ("COMPLETED", SMALL["steps"])
    assert result["attempts"] == 6
    assert result["lost_steps"] == 0
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    reasons = [event["reason"] for event in run.events("requeued")]
    assert reasons == ["preempted"] * 3 + ["time_limit", "requeued_already"], run.diagnosis()
    resumed = [event["step"] for event in run.events("resumed")]
    saved_at_stops = [event["step"] for event in run.events("requeued")]
    assert resumed == saved_at_stops
    assert run.events("checkpoint_failed") == []
    assert (len(run.events("checkpoint_saved")) > 20) == (saves == "beside")


def small_run(cluster: Cluster, folder: Path, data: Path, partition: str, pace_s: float, **more: Any) -> LiveRun:
    job = training_job(folder, kind="torch", zero_stage=0, variant="rope", data=data, partition=partition, **more)
    return LiveRun.submit(job, site_file(folder), cwd=folder, env=cluster.env, pace_s=pace_s)


def test_cancel_never_leads_to_a_requeue(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    run = small_run(cluster, tmp_path, data, "spot", 0.5)
    run.wait_step(3, attempt=0)
    done = cfe("cancel", run.run_id, cwd=tmp_path, env=cluster.env)
    assert done.returncode == 0, done.stderr
    assert run.wait_result()["state"] == "CANCELLED"
    assert cluster.wait_for_end(run.job_id) == "CANCELLED"
    assert cluster.restarts(run.job_id) == 0
    assert run.events("requeued") == []
    (saved,) = run.events("checkpoint_saved")[-1:]
    assert saved["step"] == run.step()


def test_scancel_never_leads_to_a_requeue(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    run = small_run(cluster, tmp_path, data, "spot", 0.5)
    run.wait_step(3, attempt=0)
    cluster.scancel(run.job_id)
    assert run.wait_result()["state"] == "CANCELLED"
    assert cluster.wait_for_end(run.job_id) == "CANCELLED"
    assert (cluster.restarts(run.job_id), run.events("requeued")) == (0, [])
    assert [event["reason"] for event in run.events("cancelled")] == ["cancelled"]


def test_a_user_sends_a_run_back_to_the_queue(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    run = small_run(cluster, tmp_path, data, "gpu", 0.5)
    run.wait_step(3, attempt=0)
    done = cfe("requeue", run.run_id, cwd=tmp_path, env=cluster.env)
    assert done.returncode == 0, done.stderr
    run.wait(lambda: cluster.restarts(run.job_id) == 1, 60, "requeued")
    run.pace(0)
    cluster.resume(run.job_id)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"]) == ("COMPLETED", 2, 0)
    assert [event["reason"] for event in run.events("requeued")] == ["requeue_requested"]


def test_where_preemption_cancels_a_successor_goes_on(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    run = small_run(cluster, tmp_path, data, "spot-cancel", 0.5)
    run.wait_step(3, attempt=0)
    preemptor = cluster.preempt(run.job_id)
    run.wait(lambda: run.folder.promised("job-1"), 60, "followed by a successor")
    cluster.wait_for_end(run.job_id)
    cluster.scancel(preemptor)
    run.pace(0)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"]) == ("COMPLETED", 2, 0)
    successor = (run.folder.promised("job-1") or {})["job_id"]
    assert successor != run.job_id
    assert cluster.wait_for_end(successor) == "COMPLETED"


def test_a_dead_node_costs_no_more_than_the_steps_since_the_last_checkpoint(
    cluster: Cluster, tmp_path: Path, data: Path
) -> None:
    run = small_run(cluster, tmp_path, data, "gpu", 0.4, checkpoint={"every_steps": 5})
    run.wait_step(8, attempt=0)
    node = cluster.scontrol("show", "hostnames", cluster.job(run.job_id)["NodeList"]).split()[1]
    cluster.kill_node(node)
    run.wait(lambda: cluster.restarts(run.job_id) == 1, 120, "requeued after its node died")
    run.pace(0)
    cluster.resume(run.job_id)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["final_step"]) == ("COMPLETED", 2, SMALL["steps"])
    assert 0 <= result["lost_steps"] <= 5
    (resumed,) = run.events("resumed")
    assert resumed["step"] % 5 == 0
