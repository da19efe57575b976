"""The wheel carries the job files and site profiles, and runs where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SOURCES = ("cfe_hpc", "jobs", "site_configs", "pyproject.toml", "setup.py", "setup.cfg", "MANIFEST.in", "LICENSE")


def _run(argv: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built through an sdist so that what the sdist lacks is missed here."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*SOURCES, *(["README.md"] if (REPOSITORY / "README.md").exists() else [])):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, tree / name)
    out = tmp_path_factory.mktemp("dist")
    built = _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)], out)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


def test_wheel_holds_every_job_and_site_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("jobs", "site_configs"):
        wanted = {f"cfe_hpc/shipped/{kind}/{path.name}" for path in (REPOSITORY / kind).glob("*.toml")}
        assert wanted and wanted <= names
    assert {f"cfe_hpc/config/schemas/{kind}.json" for kind in ("job", "site")} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site packages", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    installed = _run([*pip, str(wheel)], elsewhere)
    assert installed.returncode == 0, installed.stderr
    cfe = [sys.executable, "-m", "cfe_hpc"]

    listed = _run([*cfe, "sites", "list"], elsewhere, PYTHONPATH=str(target))
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == sorted(
        path.stem for path in (REPOSITORY / "site_configs").glob("*.toml")
    )

    for ref in ("train_seq", "jobs/train_seq.toml"):
        checked = _run([*cfe, "check", ref, "--site", "local"], elsewhere, PYTHONPATH=str(target))
        assert checked.returncode == 0, checked.stderr
        assert str(target / "cfe_hpc" / "shipped" / "jobs" / "train_seq.toml") in checked.stdout
    assert not list(elsewhere.iterdir())
