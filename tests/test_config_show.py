"""`config show` and `sites show` print TOML that reads back to the same values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc.cli.main import main
from cfe_hpc.config.job import Job
from cfe_hpc.config.load import load, load_site
from cfe_hpc.config.show import toml_lines
from cfe_hpc.config.site import Site
from cfe_hpc.files import tomllib

SCALARS = st.text() | st.integers(-(2**62), 2**62) | st.booleans() | st.floats(allow_nan=False)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(params=st.dictionaries(st.text(), VALUES, max_size=5), name=st.text(min_size=1, max_size=20))
def test_a_job_reads_back(params: dict[str, Any], name: str) -> None:
    job = Job(name=name, entry="a.b:c", params=params)
    text = "\n".join(toml_lines(job, lambda key: "here"))
    assert Job.model_validate(tomllib.loads(text)) == job


def test_a_site_reads_back() -> None:
    for name in ("local", "gaudi-example"):
        site, _ = load_site(name)
        assert Site.model_validate(tomllib.loads("\n".join(toml_lines(site)))) == site


def test_config_show_says_where_each_value_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFE_PROM_PORT", "9000")
    words = ["config", "show", "smoke_2rank", "--site", "local", "--set", "resources.time=90m", "--origin"]
    assert main(words) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    job_file = load("smoke_2rank", "local").job_file
    assert f'name = "smoke-2rank" # {job_file}' in lines
    assert 'time = "1h30m" # --set' in lines
    assert "port = 9000 # CFE_PROM_PORT" in lines
    assert "# partition is not set # default" in lines


def test_config_show_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "smoke_2rank", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["job"]["checkpoint"]["async"] is False
    assert document["origins"]["job.checkpoint.async"] == "default"


def test_precedence_is_printed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "precedence"]) == 0
    numbered = [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [line[3:].split("  ")[0] for line in numbered] == [
        "package defaults",
        "site",
        "job",
        "CFE_* environment",
        "--set",
    ]


def test_sites_list_and_show(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "site_configs").mkdir()
    (here / "site_configs" / "broken.toml").write_text('name = "broken"\n')
    monkeypatch.chdir(here)
    assert main(["sites", "list", "--json"]) == 0
    sites = {site["name"]: site for site in json.loads(capsys.readouterr().out)}
    assert sites["local"]["scheduler"] == "local" and sites["gaudi-example"]["partitions"] == ["gaudi", "spot"]
    assert sites["broken"]["scheduler"] is None
    assert sites["broken"]["description"] == "4 problems: see `cfe-hpc sites show broken`"
    assert main(["sites", "show", "broken"]) == 2
    assert "error: site_configs/broken.toml: scheduler: missing" in capsys.readouterr().err
    assert main(["sites", "show", "local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "local"
