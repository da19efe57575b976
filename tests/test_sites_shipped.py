"""Every profile in site_configs says where it comes from, and whether anybody has tried it; each partition of each
gives a script."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import pytest

from cfe_hpc.cli.main import main
from cfe_hpc.config.load import load_site
from cfe_hpc.config.site import Site, expand_runs_root

REPOSITORY = Path(__file__).resolve().parent.parent
PROFILES = sorted((REPOSITORY / "site_configs").glob("*.toml"))
OURS = {"local", "minislurm", "gaudi-example"}
PUBLIC = [path for path in PROFILES if path.stem not in OURS]
ENVIRONMENT = {"SCRATCH": "/s", "WORK": "/w", "PROJECT": "p", "USER": "u", "HOME": "/h", "TMPDIR": "/t", "FAST": "/f"}


def _site(path: Path) -> Site:
    return load_site(str(path), {})[0]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_says_where_it_comes_from(path: Path) -> None:
    site = _site(path)
    assert site.name == path.stem
    assert site.contact and site.description and site.url and site.documentation
    assert date.fromisoformat(site.documented_on)
    assert not site.verified or site.tested_on, "who has verified it has tried it on some day"
    assert str(expand_runs_root(site, ENVIRONMENT)).startswith("/")


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_a_public_cluster_is_marked_until_somebody_has_tried_it(path: Path) -> None:
    site, text = _site(path), path.read_text(encoding="utf-8")
    assert re.match(r"https?://", site.url)
    # Change these two together with the first lines, once `sites check` was run there.
    assert (site.verified, site.tested_on) == (False, "")
    assert "from its public documentation. Nobody has run `cfe-hpc sites check` there yet." in text
    assert "verified = false" in text


def test_there_are_enough_of_them_of_more_than_one_kind() -> None:
    kinds = {hardware.accelerator for path in PUBLIC for hardware in _site(path).hardware.values()}
    assert len(PUBLIC) >= 8 and kinds >= {"cuda", "cpu"}
    assert any(hardware.accelerator == "hpu" for path in PROFILES for hardware in _site(path).hardware.values())


def test_the_list_says_which_nobody_has_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    untried = {name for name, line in lines.items() if line.endswith(" (untried)")}
    assert untried == {path.stem for path in PUBLIC} | {"gaudi-example"}
    assert main(["sites", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows if row["verified"]} == {"minislurm"}


def test_the_documentation_lists_each() -> None:
    text = (REPOSITORY / "docs" / "sites.md").read_text(encoding="utf-8")
    section = text.partition("## Profiles that are shipped")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", section, re.M)) == sorted(path.stem for path in PROFILES)


PARTITIONS = [(path, name) for path in PROFILES for name in _site(path).partitions if _site(path).scheduler == "slurm"]


@pytest.mark.parametrize(("path", "name"), PARTITIONS, ids=lambda value: getattr(value, "stem", value))
def test_a_job_on_each_partition_asks_in_the_sites_own_words(
    path: Path,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, str(tmp_path / value.strip("/")))
    site = _site(path)
    partition = site.partitions[name]
    nodes, hardware = partition.nodes_min or 1, site.hardware[partition.hardware]
    asked = (f"resources.partition={name}", f"resources.nodes={nodes}", "resources.account=proj")
    words = [word for each in asked for word in ("--set", each)]
    job = str(REPOSITORY / "tests" / "broken" / "good-job.toml")
    assert main(["submit", job, "--site", str(path), *words, "--dry-run"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert (f"#SBATCH --partition={name}" in printed) is (partition.queue is None)
    assert ("#SBATCH --partition=" in printed) is (partition.queue != "")
    assert ("#SBATCH --gres=" in printed) is (hardware.gres is not None)
    assert ("#SBATCH --gpus-per-node=" in printed) is bool(hardware.request)
    assert ("#SBATCH --qos=" in printed) is (partition.qos is not None)
    assert ("#SBATCH --constraint=" in printed) is (partition.constraint is not None)
    assert f"#SBATCH --nodes={nodes}" in printed
