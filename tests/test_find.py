"""RUN: what people type to mean a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfe_hpc.errors import UsageError
from cfe_hpc.reports.find import find_run, runs_roots, runs_under
from cfe_hpc.runfolder import RunFolder


def _run(root: Path, run_id: str, *job_ids: str) -> RunFolder:
    path = root / run_id.rsplit("-", 3)[0] / run_id
    path.mkdir(parents=True)
    (path / "run.toml").write_text("")
    run = RunFolder(path)
    for count, job_id in enumerate(job_ids):
        run.promise("job" if count == 0 else f"job-{count}", job_id=job_id)
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    _run(root, "train-20260131-101010-aaaa", "41")
    _run(root, "train-20260131-101010-abbb", "42", "77")
    _run(root, "smoke-20260201-000000-0000", "local-4242")
    _run(root, "42-20260201-000000-1111", "43_7")
    (root / "train" / "notes").mkdir()
    return root


@pytest.mark.parametrize(
    ("ref", "run_id"),
    [
        ("train-20260131-101010-aaaa", "train-20260131-101010-aaaa"),
        ("train-20260131-101010-ab", "train-20260131-101010-abbb"),
        ("smo", "smoke-20260201-000000-0000"),
        ("41", "train-20260131-101010-aaaa"),
        ("42", "train-20260131-101010-abbb"),
        ("77", "train-20260131-101010-abbb"),
        ("77.0", "train-20260131-101010-abbb"),
        ("43_7", "42-20260201-000000-1111"),
        ("42-", "42-20260201-000000-1111"),
        ("local-4242", "smoke-20260201-000000-0000"),
    ],
)
def test_finds(root: Path, ref: str, run_id: str) -> None:
    assert find_run(ref, [root]).run_id == run_id


def test_finds_by_folder_from_anywhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "train" / "train-20260131-101010-aaaa"
    assert find_run(str(folder), []).path == folder
    monkeypatch.chdir(folder.parent)
    assert find_run("train-20260131-101010-aaaa/", []).path == folder
    monkeypatch.chdir(folder)
    assert find_run(".", []).run_id == folder.name


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("train", r"^train: means 2 runs \(train-20260131-101010-aaaa, train-20260131-101010-abbb\); give more"),
        ("trian-20260131-101010-aaaa", r"no such run under .*; did you mean train-20260131-101010-aaaa\?"),
        ("99", "^99: no such run under .*; see `cfe-hpc status`"),
        ("train/gone", "^train/gone: no such run folder"),
        ("", "^RUN: is empty"),
    ],
)
def test_says_why_not(root: Path, ref: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_run(ref, [root])


def test_no_root_at_all() -> None:
    with pytest.raises(UsageError, match="no such run under any runs root that exists"):
        find_run("train", [])


def test_runs_under_passes_other_folders_over(root: Path) -> None:
    assert len(list(runs_under([root]))) == 4


def test_roots_are_the_named_sites_or_all_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = Path(__file__).resolve().parent.parent / "site_configs" / "local.toml"
    sites = tmp_path / "site_configs"
    sites.mkdir()
    (sites / "far.toml").write_text(profile.read_text().replace('"runs"', '"$FAR/runs"').replace('"local"', '"far"', 1))
    (sites / "bad.toml").write_text("name = 1\n")
    environ = {"FAR": str(tmp_path / "scratch")}
    assert tmp_path / "runs" not in runs_roots(None, environ)
    for folder in ("runs", "scratch/runs"):
        (tmp_path / folder).mkdir(parents=True)
    assert runs_roots(None, environ)[0] == tmp_path / "runs"
    assert tmp_path / "scratch" / "runs" in runs_roots(None, environ)
    assert runs_roots("far", environ) == [tmp_path / "scratch" / "runs"]
    assert tmp_path / "scratch" / "runs" not in runs_roots(None, {})
