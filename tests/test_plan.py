"""The plan and the checks that follow it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc.cli.main import main
from cfe_hpc.config.job import Job
from cfe_hpc.config.load import Loaded
from cfe_hpc.config.site import Site
from cfe_hpc.errors import ConfigError, ImpossibleError
from cfe_hpc.launch.checks.checking import Finding, check
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.planner.cost import cost_of_attempt

GPU = {"accelerator": "cuda", "devices_per_node": 4, "cores_per_node": 30, "memory": "256GiB"}
CPU = {"accelerator": "cpu", "devices_per_node": 64, "cores_per_node": 64, "memory": "128GiB"}


def _site(**changes: Any) -> Site:
    table: dict[str, Any] = {
        "name": "s",
        "scheduler": "slurm",
        "default_partition": "gpu",
        "partitions": {
            "gpu": {"hardware": "gpu", "queue": "gpu_long", "time_limit": "24h", "default_time": "4h", "nodes_max": 8},
            "cpu": {"hardware": "cpu", "time_limit": "12h"},
            "open": {"hardware": "cpu"},
        },
        "hardware": {"gpu": {**GPU, "gres": "gpu:h200:{devices}", "cost_per_node_hour": 20.0}, "cpu": CPU},
    }
    return Site.model_validate({**table, **changes})


def _job(**tables: Any) -> Job:
    return Job.model_validate({"name": "j", "entry": "cfe_hpc.train.model:x", **tables})


def test_what_a_job_leaves_out_is_the_sites() -> None:
    planned = plan(_job(resources={"nodes": 2}), _site())
    assert planned.model_dump() == {
        "partition": "gpu",
        "queue": "gpu_long",
        "nodes": 2,
        "devices_per_node": 4,
        "world_size": 8,
        "cpus_per_device": 7,
        "accelerator": "cuda",
        "memory_bytes": None,
        "time_s": 14_400.0,
        "gres": "gpu:h200:4",
        "account": None,
        "qos": None,
        "constraint": None,
        "signal": "USR2",
        "signal_lead_s": 120,
        "preemption": {"mode": "off", "grace": 0.0, "user_signal": False},
        "options": [],
        "launcher": "srun",
        "nodes_min": None,
        "restarts": 0,
        "tasks_per_node": None,
    }


def test_what_a_job_asks_for_is_taken() -> None:
    resources = {
        "nodes": 8,
        "devices_per_node": 2,
        "cpus_per_device": 15,
        "memory": "256GiB",
        "time": "24h",
        "account": "a",
        "qos": "q",
        "constraint": "c",
    }
    planned = plan(_job(resources=resources), _site())
    assert (planned.world_size, planned.cpus_per_device, planned.gres) == (16, 15, "gpu:h200:2")
    assert (planned.memory_bytes, planned.time_s) == (256 * 2**30, 86_400.0)
    assert (planned.account, planned.qos, planned.constraint) == ("a", "q", "c")


def test_the_partitions_account_stands_in() -> None:
    partition = {"hardware": "gpu", "account": "ours", "qos": "normal", "options": ["--exclusive"]}
    planned = plan(_job(), _site(partitions={"gpu": partition}))
    assert (planned.account, planned.qos, planned.options) == ("ours", "normal", ["--exclusive"])


def test_cpu_nodes_get_one_rank_each_unless_asked() -> None:
    assert plan(_job(resources={"partition": "cpu", "nodes": 3}), _site()).world_size == 3
    assert plan(_job(resources={"partition": "cpu", "devices_per_node": 5}), _site()).world_size == 5


def test_an_accelerator_chooses_the_partition() -> None:
    assert plan(_job(resources={"accelerator": "cpu"}), _site()).partition == "cpu"
    assert plan(_job(resources={"accelerator": "cuda"}), _site()).partition == "gpu"


def test_times_without_default_or_limit() -> None:
    assert plan(_job(resources={"partition": "cpu"}), _site()).time_s == 12 * 3600
    assert plan(_job(resources={"partition": "open"}), _site()).time_s is None


def test_a_qos_may_decide_on_preemption_and_time() -> None:
    preemption = {"mode": "cancel", "grace": "30s"}
    site = _site(qos={"low": {"preemption": preemption, "time_limit": "8h"}, "long": {"time_limit": "6h"}})
    assert plan(_job(resources={"qos": "low"}), site).preemption.mode == "cancel"
    assert plan(_job(resources={"qos": "long"}), site).preemption.mode == "off"
    assert plan(_job(resources={"qos": "low", "partition": "open"}), site).time_s == 8 * 3600
    with pytest.raises(ImpossibleError, match="longer than the 6h of QOS long"):
        plan(_job(resources={"qos": "long", "time": "7h"}), site)


def test_the_lead_is_rounded_up_to_whole_seconds() -> None:
    assert plan(_job(), _site(slurm={"signal_lead": 0.2})).signal_lead_s == 1


def test_a_launcher_is_one_task_of_a_node() -> None:
    for launcher in ("torchrun", "deepspeed"):
        planned = plan(_job(resources={"nodes": 2}, launch={"launcher": launcher}), _site())
        assert (planned.launcher, planned.tasks_per_node, planned.world_size) == (launcher, 1, 8)


def test_an_elastic_job_keeps_its_range_of_nodes() -> None:
    planned = plan(_job(resources={"nodes": 4}, launch={"nodes_min": 2}), _site())
    assert (planned.nodes, planned.nodes_min, planned.world_size) == (4, 2, 16)


def test_only_a_scheduler_that_gives_out_cores_minds_their_number() -> None:
    hardware = {"gpu": {**GPU, "accelerator": "cpu", "cores_per_node": 2}, "cpu": CPU}
    job = _job(resources={"devices_per_node": 4})
    assert plan(job, _site(hardware=hardware, scheduler="local")).cpus_per_device == 1
    with pytest.raises(ImpossibleError, match="4 ranks with 1 cores each, more than the 2 of a node"):
        plan(job, _site(hardware=hardware))


@pytest.mark.parametrize(
    ("tables", "key", "what"),
    [
        ({"resources": {"nodes": 9}}, "resources.nodes", "more than the 8 nodes of partition gpu"),
        ({"resources": {"devices_per_node": 5}}, "resources.devices_per_node", "more than the 4 devices"),
        ({"resources": {"cpus_per_device": 8}}, "resources.cpus_per_device", "4 ranks with 8 cores each"),
        ({"resources": {"memory": "257GiB"}}, "resources.memory", "more than the 256 GiB"),
        ({"resources": {"time": "25h"}}, "resources.time", "longer than the 1d"),
        ({"resources": {"time": "120s"}}, "resources.time", "too short: slurm.signal_lead"),
        ({"resources": {"accelerator": "hpu"}}, "resources.accelerator", "partition gpu has cuda devices"),
        ({"launch": {"launcher": "ray"}}, "launch.launcher", "not available yet"),
    ],
)
def test_impossible(tables: dict[str, Any], key: str, what: str) -> None:
    with pytest.raises(ImpossibleError) as caught:
        plan(_job(**tables), _site(), {f"job.{key}": "here.toml"})
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == ("here.toml", key)
    assert problem.what.startswith(what)


def test_every_reason_is_told() -> None:
    resources = {"nodes": 9, "devices_per_node": 5, "memory": "1TiB", "time": "2d"}
    with pytest.raises(ImpossibleError) as caught:
        plan(_job(resources=resources, launch={"launcher": "ray"}), _site())
    assert [problem.key for problem in caught.value.problems] == [
        "resources.nodes",
        "resources.devices_per_node",
        "resources.memory",
        "resources.time",
        "launch.launcher",
    ]


def test_an_unknown_partition_is_a_mistake_not_an_impossibility() -> None:
    with pytest.raises(ConfigError, match=r"no such partition at s \(gpus\); did you mean gpu\? s has: gpu, cpu, open"):
        plan(_job(resources={"partition": "gpus"}), _site())


@settings(deadline=None)
@given(
    nodes=st.integers(1, 12),
    devices=st.none() | st.integers(1, 6),
    cpus=st.none() | st.integers(1, 40),
    memory_gib=st.none() | st.integers(1, 300),
    time_s=st.none() | st.integers(1, 100_000),
)
def test_a_plan_fits_the_site_or_there_is_none(
    nodes: int, devices: int | None, cpus: int | None, memory_gib: int | None, time_s: int | None
) -> None:
    memory = None if memory_gib is None else memory_gib * 2**30
    resources = {
        "nodes": nodes, "devices_per_node": devices, "cpus_per_device": cpus, "memory": memory, "time": time_s
    }  # fmt: skip
    site = _site()
    job = _job(resources=resources)
    fits = (
        nodes <= 8
        and (devices or 4) <= 4
        and (devices or 4) * (cpus or 7) <= 30
        and (memory_gib or 0) <= 256
        and 120 < (time_s or 14_400) <= 86_400
    )
    if fits:
        planned = plan(job, site)
        assert planned == plan(job, site)
        assert planned.world_size == planned.nodes * planned.devices_per_node
    else:
        with pytest.raises(ImpossibleError):
            plan(job, site)


def _findings(job: Job, site: Site) -> dict[str, Finding]:
    loaded = Loaded(job=job, site=site, origins={}, job_file="j.toml", site_file="s.toml")
    return {finding.id: finding for finding in check(loaded, plan(job, site))}


def test_a_job_that_is_suspended_needs_no_grace() -> None:
    def found(mode: str) -> dict[str, Finding]:
        partition = {"hardware": "gpu", "default_time": "4h", "preemption": {"mode": mode}}
        return _findings(_job(), _site(partitions={"gpu": partition}))

    assert "short-grace" in found("requeue")
    assert "short-grace" not in found("suspend")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _local(**changes: Any) -> Site:
    return _site(scheduler="local", **changes)


SAVING = {"checkpoint": {"every_steps": 10}}
SLURM = {"scheduler": "slurm", "storage": {"shared": ["/"]}}


def test_nothing_to_remark(here: Path) -> None:
    assert _findings(_job(**SAVING), _local()) == {}


@pytest.mark.parametrize(
    ("id_", "severity", "tables", "changes"),
    [
        ("no-checkpoints", "warning", {}, {}),
        ("kept-seldom", "warning", {"checkpoint": {"every_steps": 10, "keep_every_steps": 25}}, {}),
        ("program-missing", "warning", {**SAVING, "entry": "no_such_package.x:y"}, {}),
        ("program-missing", "warning", {"entry": None, "command": ["no-such-program"]}, {}),
        ("signal-at-start", "warning", {**SAVING, "resources": {"time": "170s"}}, SLURM),
        ("no-time-limit", "note", {**SAVING, "resources": {"partition": "open"}}, SLURM),
        ("overlap-unused", "note", {"checkpoint": {"every": "5m", "overlap": True}}, {}),
        ("staging-unused", "note", {"checkpoint": {"every": "5m", "staging_memory": "1GiB"}}, {}),
        ("local-tier", "error", {"checkpoint": {"every_steps": 10, "async": True, "local": True}}, {}),
        ("not-yet", "warning", {**SAVING, "metrics": {"otlp_endpoint": "http://c:4318"}}, {}),
        ("runs-root", "error", SAVING, {"storage": {"runs_root": "file/runs"}}),
        (
            "short-grace",
            "warning",
            SAVING,
            {"partitions": {"gpu": {"hardware": "gpu", "preemption": {"mode": "requeue", "grace": "30s"}}}},
        ),
        (
            "preemption-cancels",
            "note",
            SAVING,
            {"partitions": {"gpu": {"hardware": "gpu", "preemption": {"mode": "cancel", "grace": "5m"}}}},
        ),
        (
            "data-missing",
            "error",
            {**SAVING, "entry": "cfe_hpc.train.main:run", "params": {"data": "gone.h5", "micro_batch": 4}},
            {},
        ),
    ],
)
def test_finding(here: Path, id_: str, severity: str, tables: dict[str, Any], changes: dict[str, Any]) -> None:
    (here / "file").write_text("")
    findings = _findings(_job(**tables), _site(**{"scheduler": "local", **changes}))
    assert {id_: severity} == {finding.id: finding.severity for finding in findings.values()}


def test_uncommitted_changes_are_noted(here: Path) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (here / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True, timeout=30)
    assert _findings(_job(**SAVING), _local()) == {}
    (here / "file").write_text("2")
    assert "1 tracked files" in _findings(_job(**SAVING), _local())["git-dirty"].problem.what


def test_cost_is_price_times_nodes_times_hours() -> None:
    job, site = _job(resources={"nodes": 2, "time": "90m"}), _site()
    loaded = Loaded(job=job, site=site, origins={}, job_file="j.toml", site_file="s.toml")
    assert cost_of_attempt(loaded, plan(job, site)) == 60.0


def test_check_exits_with_1_when_a_check_finds_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "smoke_2rank", "--site", "local", "--set", "params.data=gone.h5", "--json"]) == 1
    assert '"id": "data-missing"' in capsys.readouterr().out
