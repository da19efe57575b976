"""What a preemption does to a job, in one line; what earlier runs have measured, and what follows from it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cfe_hpc.cli.main import main
from cfe_hpc.config.load import load
from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Preemption, Site
from cfe_hpc.launch.checks.checking import check
from cfe_hpc.launch.history import find_measured, plan_with_history
from cfe_hpc.launch.plan import plan
from cfe_hpc.recovery.contract import exit_in_grace, fits, sentence
from cfe_hpc.recovery.measured import Measured

QUICK = Measured(step_p95_s=0.15, save_p95_s=0.41, blocked_p95_s=0.05, interruptions=0, trained_s=60.0)
SLOW = replace(QUICK, step_p95_s=30.0, save_p95_s=210.0)


@pytest.mark.parametrize(
    ("version", "fate"),
    [
        ("22.05.8", "lost"),
        ("23.11.10", "lost"),
        ("24.05.0-rc1", "requeued"),
        ("25.05.9", "requeued"),
        (None, "unknown"),
        ("slurm", "unknown"),
    ],
)
def test_what_becomes_of_a_job_that_exits_in_its_grace(version: str | None, fate: str) -> None:
    assert exit_in_grace(version) == fate


def _site(**slurm: Any) -> Site:
    hardware = {"accelerator": "cpu", "devices_per_node": 4, "cores_per_node": 8, "memory": "8GiB"}
    return Site.model_validate(
        {
            "name": "s",
            "scheduler": "slurm",
            "default_partition": "p",
            "partitions": {"p": {"hardware": "h", "default_time": "1h"}},
            "hardware": {"h": hardware},
            "slurm": slurm,
        }
    )


def _plan(mode: str = "requeue", grace_s: float = 10.0, *, user_signal: bool = False) -> Plan:
    preemption = Preemption.model_validate({"mode": mode, "grace": grace_s, "user_signal": user_signal})
    return Plan(
        partition="p",
        queue="p",
        nodes=1,
        devices_per_node=1,
        world_size=1,
        cpus_per_device=1,
        accelerator="cpu",
        signal="USR2",
        signal_lead_s=120,
        preemption=preemption,
    )


def test_a_save_fits_the_grace_or_does_not() -> None:
    assert fits(_plan(grace_s=0.56), _site(), QUICK) is True
    assert fits(_plan(grace_s=0.55), _site(), QUICK) is False
    assert fits(_plan(), _site(), None) is None
    assert fits(_plan("suspend"), _site(), SLOW) is None
    # Without a grace Slurm still waits between TERM and KILL.
    assert fits(_plan(grace_s=0), _site(kill_wait=0.56), QUICK) is True
    assert fits(_plan(grace_s=0), _site(kill_wait=0.55), QUICK) is False


@pytest.mark.parametrize(
    ("planned", "slurm", "measured", "said"),
    [
        (_plan("off"), {}, SLOW, "none in this partition"),
        (
            _plan(),
            {"version": "22.05.8"},
            QUICK,
            "requeue: TERM, 10s to save; Slurm 22.05.8 forgets a job that exits then, so all ranks save and the run "
            "requeues itself; measured: save 0.41 s + step 0.15 s (p95): fits",
        ),
        (
            _plan(grace_s=90, user_signal=True),
            {"version": "24.05.1", "max_batch_requeue": 3},
            SLOW,
            "requeue: USR2, 1m30s to save; Slurm 24.05.1 requeues a job that exits then, and holds it after 3 times, "
            "so all ranks save and the run requeues itself; measured: save 210 s + step 30 s (p95): does not fit",
        ),
        (
            _plan("cancel"),
            {},
            None,
            "cancel: TERM, 10s to save; Slurm cancels the job, a successor goes on in the same run folder; how long a "
            "save takes is not known yet",
        ),
        (
            _plan(grace_s=0),
            {},
            None,
            "requeue: TERM, 30s (KillWait) to save; Slurm may forget a job that exits then "
            "(slurm.version is not set), so all ranks save and the run requeues itself; how long a save takes is not "
            "known yet",
        ),
        (
            _plan("suspend"),
            {},
            SLOW,
            "suspend: Slurm stops the ranks and lets them go on later; nothing has to be saved",
        ),
    ],
)
def test_the_contract_in_one_line(planned: Plan, slurm: dict[str, Any], measured: Measured | None, said: str) -> None:
    assert sentence(planned, _site(**slurm), measured) == said


JOB: dict[str, Any] = {"name": "j", "command": ["true"], "resources": {"partition": "spot"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "j.toml").write_text(tomli_w.dumps(JOB))
    return tmp_path


def earlier(here: Path, stamp: str, measured: Any, *, partition: str = "spot", site: str = "minislurm") -> None:
    """The folder of a run that has ended."""
    folder = here / "runs" / "j" / f"j-{stamp}-abcd"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(tomli_w.dumps({"site": {"name": site}, "plan": {"partition": partition}}))
    (folder / "result.json").write_text(json.dumps({"state": "COMPLETED", "measured": measured}))


def found() -> Measured | None:
    loaded = load("j.toml", "minislurm", [], os.environ)
    return find_measured(loaded, plan(loaded.job, loaded.site, loaded.origins))


def test_the_newest_run_that_has_measured_here_counts(here: Path) -> None:
    assert found() is None
    earlier(here, "20260101-000000", asdict(SLOW))
    earlier(here, "20260102-000000", asdict(QUICK))
    assert found() == QUICK
    earlier(here, "20260103-000000", asdict(SLOW), partition="gpu")
    assert found() == QUICK
    earlier(here, "20260104-000000", asdict(SLOW), site="other")
    assert found() == QUICK
    earlier(here, "20260105-000000", None)
    assert found() is None  # three results are read, not more


@pytest.mark.parametrize("measured", [None, {}, {"step_p95_s": 1.0}, [1], "text", {**asdict(QUICK), "new": 1}])
def test_a_result_of_another_version_is_passed_over(here: Path, measured: Any) -> None:
    earlier(here, "20260101-000000", asdict(QUICK))
    earlier(here, "20260102-000000", measured)
    (here / "runs" / "j" / "j-20260103-000000-abcd").mkdir()
    assert found() == QUICK


def test_the_lead_of_the_signal_is_what_was_measured_where_that_is_longer(here: Path) -> None:
    loaded = load("j.toml", "minislurm", [], os.environ)
    assert plan_with_history(loaded)[0].signal_lead_s == 20
    earlier(here, "20260101-000000", asdict(SLOW))
    assert plan_with_history(loaded) == (plan(loaded.job, loaded.site, measured=SLOW), SLOW)
    assert plan_with_history(loaded)[0].signal_lead_s == 300
    short = load("j.toml", "minislurm", ["resources.time=4m"], os.environ)
    assert plan_with_history(short)[0].signal_lead_s == 120
    local = load("j.toml", "local", ["resources.partition=local"], os.environ)
    assert plan(local.job, local.site, measured=SLOW).signal_lead_s == 240


@pytest.mark.parametrize(("measured", "warns"), [(None, True), (QUICK, False), (SLOW, True)])
def test_the_grace_is_compared_with_what_was_measured(here: Path, measured: Measured | None, warns: bool) -> None:
    loaded = load("j.toml", "minislurm", [], os.environ)
    findings = {each.id: each.problem for each in check(loaded, plan(loaded.job, loaded.site), measured=measured)}
    assert ("short-grace" in findings) is warns
    if measured is SLOW:
        assert "took 240 s in an earlier run" in findings["short-grace"].what


def test_check_and_submit_say_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier(here, "20260101-000000", asdict(QUICK))
    assert main(["check", "j.toml", "--site", "minislurm"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("preemption"))
    assert line.endswith("measured: save 0.41 s + step 0.15 s (p95): fits")
    assert main(["check", "j.toml", "--site", "minislurm", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["measured"], document["preemption"]) == (asdict(QUICK), line.removeprefix("preemption").strip())
    assert main(["submit", "j.toml", "--site", "minislurm", "--dry-run"]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["site.slurm.version=22.05.8", "site.slurm.proctrack=cgroup"], set()),
        (["site.slurm.version=22.05.8", "site.slurm.proctrack=cgroup", "site.slurm.job_requeue=false"], {"no-requeue"}),
        (["site.slurm.job_requeue=true"], {"preemption-contract"}),
    ],
)
def test_what_a_profile_leaves_open_is_a_note(here: Path, sets: list[str], expected: set[str]) -> None:
    profile = {
        **_site().model_dump(mode="python", exclude_none=True),
        "partitions": {"spot": {"hardware": "h", "preemption": {"mode": "requeue", "grace": "1h"}}},
        "default_partition": "spot",
    }
    (here / "s.toml").write_text(tomli_w.dumps(profile))
    loaded = load("j.toml", "s.toml", sets, os.environ)
    findings = {each.id: each.severity for each in check(loaded, plan(loaded.job, loaded.site))}
    assert {name for name in findings if name in ("preemption-contract", "no-requeue")} == expected
    assert all(findings[name] == "note" for name in expected)


@pytest.mark.parametrize(("global_batch", "unfit"), [(24, ""), (16, "3 nodes"), (4, "3 nodes")])
def test_every_number_of_nodes_must_share_the_batch_out_evenly(here: Path, global_batch: int, unfit: str) -> None:
    job = {
        "name": "e",
        "entry": "cfe_hpc.train.main:run",
        "resources": {"nodes": 4, "partition": "gpu"},
        "params": {"global_batch": global_batch, "micro_batch": 1},
    }
    (here / "e.toml").write_text(tomli_w.dumps(job))
    loaded = load("e.toml", "minislurm", [], os.environ)
    elastic = plan(loaded.job, loaded.site).model_copy(update={"nodes_min": 1})
    errors = [each.problem.what for each in check(loaded, elastic) if each.id == "elastic-batch"]
    assert errors == ([f"cannot be shared out evenly among the ranks of {unfit}"] if unfit else [])
