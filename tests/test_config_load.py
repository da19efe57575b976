"""Layers: which value wins, and that its origin is told truly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from cfe_hpc.config import shipped
from cfe_hpc.config.environment import HONOURED
from cfe_hpc.config.load import PRECEDENCE, Loaded, load, load_site
from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.stage import load_pipeline
from cfe_hpc.errors import ConfigError, PipelineError
from cfe_hpc.files import read_toml

SITE = """
name = "s"
scheduler = "slurm"
default_partition = "p"
partitions.p.hardware = "h"
[hardware.h]
accelerator = "cpu"
devices_per_node = 2
cores_per_node = 4
memory = "8GiB"
"""
JOB = 'name = "j"\nentry = "pkg.mod:run"\n'
TRAIN = 'name = "j"\nentry = "cfe_hpc.train.main:run"\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _load(
    here: Path,
    *,
    site: str = "",
    job: str = "",
    environ: Mapping[str, str] | None = None,
    overrides: tuple[str, ...] = (),
) -> Loaded:
    (here / "s.toml").write_text(SITE + site)
    (here / "j.toml").write_text(job if job.startswith("name") else JOB + job)
    return load("j.toml", "s.toml", overrides, environ)


URLS = [f"http://{letter}:4318" for letter in "abcd"]


@pytest.mark.parametrize("layers", range(len(PRECEDENCE)))
def test_each_layer_wins_over_those_before(here: Path, layers: int) -> None:
    site, job, environ, override = ([*URLS[:layers], *[None] * 4])[:4]
    loaded = _load(
        here,
        site=f'[metrics]\notlp_endpoint = "{site}"\n' if site else "",
        job=f'[metrics]\notlp_endpoint = "{job}"\n' if job else "",
        environ={"CFE_OTEL_ENDPOINT": environ} if environ else {},
        overrides=(f"metrics.otlp_endpoint={override}",) if override else (),
    )
    assert loaded.job.metrics.otlp_endpoint == [None, *URLS][layers]
    origin = ["default", "s.toml", "j.toml", "CFE_OTEL_ENDPOINT", "--set"][layers]
    assert loaded.origins["job.metrics.otlp_endpoint"] == origin


def test_origins_name_every_value_of_job_and_site(here: Path) -> None:
    loaded = _load(
        here,
        job='[engine.deepspeed]\nzero_optimization = { offload = { device = "cpu" } }\n[params]\n"a b" = 1\n',
        overrides=("engine.deepspeed.zero_optimization.overlap_comm=true", "site.slurm.signal_lead=45s"),
    )
    origins = loaded.origins
    assert origins["job.name"] == "j.toml"
    assert origins["job.checkpoint.async"] == "default"
    assert origins["job.engine.deepspeed.zero_optimization.offload.device"] == "j.toml"
    assert origins["job.engine.deepspeed.zero_optimization.overlap_comm"] == "--set"
    assert origins['job.params."a b"'] == "j.toml"
    assert origins["site.hardware.h.memory"] == "s.toml"
    assert origins["site.slurm.signal_lead"] == "--set" and loaded.site.slurm.signal_lead == 45.0
    assert origins["site.storage.runs_root"] == "default"
    assert (loaded.job_file, loaded.site_file) == ("j.toml", "s.toml")


def test_tables_merge_and_lists_are_replaced(here: Path) -> None:
    loaded = _load(
        here,
        job="[params]\nsizes = [1, 2]\nmodel = { dim = 4, heads = 2 }\n",
        overrides=("params.sizes=[3]", "params.model.dim=8", "params.model={ layers = 1 }"),
    )
    assert loaded.job.params == {"sizes": [3], "model": {"dim": 8, "heads": 2, "layers": 1}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("1e-3", 0.001),
        ("true", True),
        ('"true"', "true"),
        ("4h", "4h"),
        ("two words", "two words"),
        ("", ""),
        ("a=b", "a=b"),
        ("[1, 2]", [1, 2]),
        ('{ a = "b" }', {"a": "b"}),
        ("'single'", "single"),
        ("a#b", "a#b"),
        ("1 # one", "1 # one"),
        ("1\nname = 2", "1\nname = 2"),
        ("2026-01-31", "2026-01-31"),
        ("02:30:00", "02:30:00"),
        ("$(touch x)", "$(touch x)"),
        ('"un', '"un'),
        ("ünïcode", "ünïcode"),
    ],
)
def test_set_takes_toml_or_else_text(here: Path, text: str, value: object) -> None:
    assert _load(here, overrides=(f"params.x={text}",)).job.params["x"] == value


def test_set_of_text_keys_may_look_like_numbers(here: Path) -> None:
    job = _load(here, overrides=("resources.account=0042", "name=7", 'params."a.b"=1', "resources.qos=1e3")).job
    assert (job.resources.account, job.name, job.params, job.resources.qos) == ("0042", "7", {"a.b": 1}, "1e3")


def test_of_two_settings_of_a_key_the_later_wins(here: Path) -> None:
    assert _load(here, overrides=("resources.nodes=2", "resources.nodes=3")).job.resources.nodes == 3


def test_variables_reach_their_keys(here: Path) -> None:
    (here / "ds.json").write_text(
        json.dumps({"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True})
    )
    loaded = _load(
        here,
        job=TRAIN + "[engine.deepspeed]\nwall_clock_breakdown = false\n",
        environ={
            "CFE_LAUNCHER": "ray",
            "CFE_DS_CONFIG": str(here / "ds.json"),
            "CFE_ROPE_VARIANT": "irope",
            "CFE_IROPE_GROUPS": "4",
            "CFE_PROM_PORT": "9000",
            "CFE_OTEL_ENABLED": "yes",
        },
    )
    job = loaded.job
    assert job.launch.launcher == "ray"
    assert job.engine.deepspeed == {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}
    assert job.params == {"rope_variant": "irope", "irope_groups": 4}
    assert (job.metrics.port, job.metrics.otlp_endpoint) == (9000, "http://localhost:4318")
    assert loaded.origins["job.engine.deepspeed.wall_clock_breakdown"] == "CFE_DS_CONFIG"
    assert loaded.origins["job.params.irope_groups"] == "CFE_IROPE_GROUPS"


@pytest.mark.parametrize(
    ("environ", "port", "pushgateway"),
    [
        ({"CFE_PROM_ENABLED": "1"}, None, "http://g:9091"),
        ({"CFE_PROM_ENABLED": "0"}, None, None),
        ({"CFE_PROM_ENABLED": "0", "CFE_PROM_PORT": "9000"}, None, None),
        ({"CFE_PROM_PORT": "9000"}, 9000, "http://g:9091"),
        ({"CFE_PROM_PORT": " "}, None, "http://g:9091"),
    ],
)
def test_prometheus_is_switched(here: Path, environ: dict[str, str], port: int | None, pushgateway: str | None) -> None:
    metrics = _load(here, job='[metrics]\npushgateway = "http://g:9091"\n', environ=environ).job.metrics
    assert (metrics.port, metrics.pushgateway) == (port, pushgateway)


def test_prometheus_switched_on_without_a_port_gets_one(here: Path) -> None:
    assert _load(here, environ={"CFE_PROM_ENABLED": "true"}).job.metrics.port == 9464


def test_set_wins_over_a_switch(here: Path) -> None:
    loaded = _load(here, environ={"CFE_PROM_ENABLED": "off"}, overrides=("metrics.port=9001",))
    assert loaded.job.metrics.port == 9001


def test_variables_of_the_shipped_training_leave_other_entries_alone(here: Path) -> None:
    environ = {"CFE_ROPE_VARIANT": "irope", "CFE_IROPE_GROUPS": "4", "CFE_GATE_MODE": "x"}
    assert _load(here, environ=environ).job.params == {}


def test_our_own_variables_are_no_typing_mistakes(here: Path) -> None:
    internal = {"CFE_RUN_DIR": "/x", "CFE_ATTEMPT": "0", "CFE_ATTEMPT_BASE": "2", "CFE_SITE": "s.toml", "CFE_OWN": "1"}
    _load(here, environ=internal)


def test_the_default_site_is_cfe_sites_else_local(here: Path) -> None:
    assert load_site(None, {})[0].name == "local"
    (here / "site_configs").mkdir()
    (here / "site_configs" / "mine.toml").write_text(SITE)
    site, file = load_site(None, {"CFE_SITE": "mine"})
    assert (site.name, file) == ("s", "site_configs/mine.toml")
    assert load_site("local", {"CFE_SITE": "mine"})[0].name == "local"


def test_a_name_finds_ones_own_file_before_the_shipped_one(here: Path) -> None:
    assert shipped.resolve("smoke_2rank", "jobs") == shipped.resolve("jobs/smoke_2rank.toml", "jobs")
    (here / "jobs").mkdir()
    (here / "jobs" / "smoke_2rank.toml").write_text(JOB)
    assert shipped.shown(shipped.resolve("smoke_2rank", "jobs")) == "jobs/smoke_2rank.toml"


@pytest.mark.parametrize("name", shipped.available("site_configs"))
def test_shipped_sites_are_good_and_named_as_their_files(name: str) -> None:
    site, _ = load_site(name)
    assert site.name == name
    assert site.description and site.contact and site.url


@pytest.mark.parametrize("name", shipped.available("jobs"))
def test_shipped_jobs_are_good(name: str) -> None:
    wanted = name.replace("_", "-").replace("2-rank", "2rank")
    try:
        assert load(name, "local").job.name == wanted
    except PipelineError:
        assert {stage.loaded.job.name for stage in load_pipeline(name, "local")} >= {f"{wanted}-train"}


def test_a_site_whose_file_is_gone_does_not_hide_the_jobs_problems(here: Path) -> None:
    (here / "j.toml").write_text('name = "j"\n')
    with pytest.raises(ConfigError) as caught:
        load("j.toml", "gone.toml")
    assert [problem.file for problem in caught.value.problems] == ["gone.toml", "j.toml"]


def test_a_loaded_job_survives_run_toml(here: Path) -> None:
    from cfe_hpc.config.run import Provenance
    from cfe_hpc.launch.plan import plan

    loaded = _load(here, job='[params]\ntext = "a\\nb\\"; \\u00e9"\nnested = { list = [1.5, true] }\n')
    provenance = Provenance(
        user="u", host="h", time="t", workdir="w", python="p", job_file=loaded.job_file, site_file=loaded.site_file
    )
    spec = RunSpec(
        run_id="j-20260131-000000-abcd",
        job=loaded.job,
        site=loaded.site,
        plan=plan(loaded.job, loaded.site),
        provenance=provenance,
        origins=dict(loaded.origins),
    )
    spec.write(here / "run.toml")
    assert RunSpec.read(here / "run.toml") == spec
    assert "async" in read_toml(here / "run.toml")["job"]["checkpoint"]


def test_every_honoured_variable_of_the_contract_is_there() -> None:
    contract = (
        "LAUNCHER DS_CONFIG GATE_MODE ROPE_VARIANT IROPE_GROUPS PROM_ENABLED PROM_PORT OTEL_ENABLED OTEL_ENDPOINT"
    )
    assert set(HONOURED) == {f"CFE_{name}" for name in contract.split()}
