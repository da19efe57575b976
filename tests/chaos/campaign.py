"""Many runs hurt at the same time, on one cluster."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster
from spine.harness import SMALL, LiveRun, cfe, site_file
from spine.stage import Stage

from chaos.oracle import lost_steps, orphans, problems
from chaos.plan import STEPS, RunPlan
from chaos.ward import Surroundings, Ward

__all__ = ["Outcome", "SharedCluster", "build_data", "campaign", "outcome_of", "undisturbed_weights"]

_ORPHANS_S = 20.0


class SharedCluster(Cluster):
    """A cluster whose commands wait while one run has its controller paused: they would fail, or be done unseen."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._turn = threading.Condition()
        self._speaking = 0
        self._paused_by: int | None = None

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Within, the controller answers."""
        me = threading.get_ident()
        with self._turn:
            self._turn.wait_for(lambda: self._paused_by in (None, me))
            self._speaking += 1
        try:
            yield
        finally:
            with self._turn:
                self._speaking -= 1
                self._turn.notify_all()

    def run(self, *argv: str, timeout_s: float = 30.0, cwd: Path | None = None) -> str:
        with self.speaking():
            return super().run(*argv, timeout_s=timeout_s, cwd=cwd)

    @contextlib.contextmanager
    def controller_paused(self) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: self._paused_by is None)
            self._paused_by = threading.get_ident()
            self._turn.wait_for(lambda: self._speaking == 0)
        try:
            with super().controller_paused():
                yield
        finally:
            with self._turn:
                self._paused_by = None
                self._turn.notify_all()


class _CampaignStage(Stage):
    """A stage whose verbs speak to the controller as the cluster's own commands do."""

    cluster: SharedCluster

    def submit(self, partition: str, **words: Any) -> LiveRun:
        with self.cluster.speaking():
            return super().submit(partition, **words)

    def cfe(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        with self.cluster.speaking():
            return super().cfe(*words, status=status)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one run.

    Attributes:
        problems: everything that is not as it should be.
        diagnosis: the run's own words, where there are problems.
    """

    plan: RunPlan
    state: str
    attempts: int
    lost: dict[int, int]
    seconds: float
    problems: list[str]
    diagnosis: str = ""


def outcome_of(ward: Ward, undisturbed: str | None) -> Outcome:
    """Take a run through its plan, and look at it."""
    with ward.equipped():
        return _outcome(ward, undisturbed)


def _outcome(ward: Ward, undisturbed: str | None) -> Outcome:
    began_s = time.monotonic()
    found: list[str] = []
    words = ""
    try:
        ward.go_through()
    except Exception as error:  # whatever it is, it is one run's: the others go on
        found.append(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        words = traceback.format_exc()
    run = ward.submitted
    if run is not None:
        _settle(run)
        found += problems(ward, undisturbed)
    result = (run.folder.result() if run is not None else None) or {}
    return Outcome(
        plan=ward.plan,
        state=result.get("state", "none"),
        attempts=int(result.get("attempts", 0)),
        lost=lost_steps(run) if run is not None else {},
        seconds=time.monotonic() - began_s,
        problems=found,
        diagnosis=f"{words}\n{run.diagnosis()}" if found and run is not None else words,
    )


def _settle(run: LiveRun) -> None:
    """Let what has been told to end do so."""
    deadline = time.monotonic() + _ORPHANS_S
    while orphans(run.folder.path) and time.monotonic() < deadline:
        time.sleep(0.5)


def campaign(
    cluster: SharedCluster, folder: Path, plans: Sequence[RunPlan], around: Surroundings, *, at_a_time: int
) -> Iterator[Outcome]:
    """Take all runs through their plans, so many at a time; outcomes in the order of the plans."""
    trained = any(plan.workload == "training" for plan in plans)
    undisturbed = undisturbed_weights(_CampaignStage(cluster, folder / "undisturbed"), around) if trained else None
    with ThreadPoolExecutor(at_a_time) as pool:
        wards = [Ward(_CampaignStage(cluster, folder / f"run-{plan.number}"), plan, around) for plan in plans]
        yield from pool.map(lambda ward: outcome_of(ward, undisturbed), wards)


def undisturbed_weights(stage: Stage, around: Surroundings) -> str:
    """The digest of the weights that the training comes to when nobody hurts it."""
    run = stage.submit(
        "spot",
        nodes=2,
        site=site_file(stage.folder),
        entry="entries_chaos:training",
        engine={"kind": "torch"},
        params={**SMALL, "steps": STEPS, "eval_every": 50, "data": str(around.data)},
    )
    return str(run.wait_result(240)["weights_sha256"])


def build_data(folder: Path, env: dict[str, str]) -> Path:
    """A small token file that all runs read."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(40):
        (texts / f"{number:02d}.txt").write_text(f"the {number} lazy dogs and the quick fox {number * 7919}\n" * 60)
    done = cfe("data", "build", str(folder / "tokens.h5"), str(texts), cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return folder / "tokens.h5"
