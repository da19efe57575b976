"""The job entry: data, evaluation, and stops at every place where it lets itself be stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.config.job import Engine, Job
from cfe_hpc.data.build import build_from_paths
from cfe_hpc.data.sources import stdlib_sources
from cfe_hpc.errors import ConfigError
from cfe_hpc.train import main
from cfe_hpc.train.config import Params
from cfe_hpc.train.evaluate import Evaluations

STEPS = 6
PARAMS = {
    "data": "tokens.h5", "d_model": 16, "layers": 2, "heads": 2, "seq_len": 16, "global_batch": 4, "micro_batch": 2,
    "steps": STEPS, "warmup_steps": 1, "eval_every": 2, "eval_batches": 3,
}  # fmt: skip


class StandIn:
    """What main.run needs of a Run, on one rank and in memory; `stop_at` is the question that it answers by a stop."""

    rank, world_size, device, lr_scale = 0, 1, "cpu", 1.0
    group = SoloGroup()

    def __init__(self, workdir: Path, params: dict[str, Any], saved: Any = None, stop_at: int | None = None) -> None:
        job = Job(name="x", entry="x:y", engine=Engine(kind="torch"), params=params)
        provenance = SimpleNamespace(job_file="jobs/x.toml", workdir=str(workdir))
        plan = SimpleNamespace(world_size=1)
        self.spec = SimpleNamespace(job=job, plan=plan, provenance=provenance, origins={})
        self.params, self.folder = params, SimpleNamespace(path=workdir)
        self.saved, self.stop_at, self.questions = saved, stop_at, 0
        self.logged: dict[int, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self.done, self.in_body, self.ended = 0, False, False
        self.metrics: dict[str, float] = {}

    def init_distributed(self) -> None:
        pass

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def micro_batch(self, wanted: int) -> int:
        return wanted

    def track(self, **objects: Any) -> None:
        self.objects = objects

    def expect(self, **facts: Any) -> None:
        self.facts.update(facts)

    def steps(self, total: int) -> Iterator[int]:
        if self.saved is not None:
            self.done, states = self.saved
            for name, state in states.items():
                self.objects[name].load_state_dict(state)
        while self.done < total:
            self.in_body = True
            yield self.done
            self.in_body = False
            self.done += 1
            self._question()
        self.ended = True

    def log(self, **values: Any) -> None:
        self.logged.setdefault(self.done, {}).update(values)

    def check_stop(self, *, updated: bool = True) -> None:
        self._question(one_more=self.in_body and updated)

    def finish(self, metrics: dict[str, float]) -> None:
        self.metrics = metrics

    def _question(self, *, one_more: bool = False) -> None:
        assert not self.ended
        self.questions += 1
        if self.questions == self.stop_at:
            states = {name: copy.deepcopy(thing.state_dict()) for name, thing in self.objects.items()}
            self.saved = (self.done + one_more, states)
            raise SystemExit


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{number} " + "to be or not to be, that is the question; " * 20)
    build_from_paths(folder / "tokens.h5", sorted(folder.glob("*.txt")))
    return folder


def weights(run: StandIn) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in run.objects["model"].named_parameters()}


@pytest.fixture(scope="module")
def undisturbed(workdir: Path) -> StandIn:
    run = StandIn(workdir, PARAMS)
    main.run(run)
    return run


def test_a_whole_run(undisturbed: StandIn) -> None:
    assert sorted(undisturbed.logged) == list(range(STEPS))
    assert [step for step, values in undisturbed.logged.items() if "val_loss" in values] == [0, 1, 3, 5]
    values = undisturbed.logged[2]
    assert set(values) == {"loss", "lr", "grad_norm", "tokens"}
    assert values["tokens"] == 64
    assert undisturbed.facts["rope_variant"] == "rope"
    assert undisturbed.facts["irope_groups"] is None
    first, last = undisturbed.metrics["first_val_loss"], undisturbed.metrics["val_loss"]
    assert 5.0 < first < 6.0
    assert last == undisturbed.logged[5]["val_loss"] < first


def test_a_stop_anywhere_costs_nothing(workdir: Path, undisturbed: StandIn) -> None:
    """Boundaries and every batch of every evaluation: before the first step, in the middle, after the last."""
    for stop_at in range(1, undisturbed.questions + 1):
        stopped = StandIn(workdir, PARAMS, stop_at=stop_at)
        with pytest.raises(SystemExit):
            main.run(stopped)
        again = StandIn(workdir, {**PARAMS, "seed": 0}, saved=stopped.saved)
        main.run(again)
        assert again.metrics == undisturbed.metrics, stop_at
        assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(again).items()), stop_at
        evaluated = [
            values["val_loss"] for run in (stopped, again) for values in run.logged.values() if "val_loss" in values
        ]
        everything = [values["val_loss"] for values in undisturbed.logged.values() if "val_loss" in values]
        # The very last evaluation, when it is done after the end, is in the result alone.
        assert evaluated in (everything, everything[:-1]), stop_at


def test_smaller_passes_give_the_same_losses(workdir: Path, undisturbed: StandIn) -> None:
    run = StandIn(workdir, PARAMS)
    run.micro_batch = lambda wanted: wanted // 2  # type: ignore[method-assign]
    main.run(run)
    for step, values in undisturbed.logged.items():
        for name in ("loss", "val_loss", "grad_norm"):
            assert float(run.logged[step].get(name, 0)) == pytest.approx(float(values.get(name, 0)), rel=1e-5)
    assert run.metrics == pytest.approx(undisturbed.metrics, rel=1e-5)


def test_a_lowered_rate_is_the_rate_of_the_next_step(workdir: Path, undisturbed: StandIn) -> None:
    run = StandIn(workdir, PARAMS)
    run.lr_scale = 0.5
    main.run(run)
    assert [values["lr"] for values in run.logged.values()] == [
        values["lr"] / 2 for values in undisturbed.logged.values()
    ]


def test_tokens_beyond_the_vocabulary_are_refused(workdir: Path) -> None:
    with pytest.raises(ConfigError, match=r"jobs/x\.toml: params\.vocab_size: .*set vocab_size = 256"):
        main.run(StandIn(workdir, {**PARAMS, "vocab_size": 255}))


def test_the_embedded_corpus_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [source for source in stdlib_sources() if source.size_bytes > 20_000][:3]
    monkeypatch.setattr("cfe_hpc.train.corpus.stdlib_sources", lambda: small)
    run = StandIn(tmp_path, {**PARAMS, "data": "stdlib", "steps": 1})
    main.run(run)
    path = tmp_path / "data" / "stdlib.h5"
    built = path.stat().st_mtime_ns
    main.run(StandIn(tmp_path, {**PARAMS, "data": "stdlib", "steps": 1}))
    assert path.stat().st_mtime_ns == built


def test_evaluations_fall_due_at_the_start_on_schedule_and_at_the_end() -> None:
    evaluations = Evaluations(Params(steps=5, warmup_steps=0, eval_every=2))
    evaluations.finished(5.5)
    due = []
    for done in range(1, 6):
        if evaluations.step_done(done):
            due.append(done)
            evaluations.finished(5.0 - done)
    assert due == [2, 4, 5]
    assert (evaluations.first, evaluations.last) == (5.5, 0.0)
    never = Evaluations(Params(steps=5, warmup_steps=0, eval_every=0))
    never.finished(5.5)
    assert [done for done in range(1, 6) if never.step_done(done)] == [5]
