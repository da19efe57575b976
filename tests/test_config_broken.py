"""Every file in tests/broken says in its first lines how `check` must end and what it must say of it, word for word.

`job-*.toml` are checked for the site local; with `site-*.toml`, good-job.toml is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from cfe_hpc.cli.main import main

BROKEN = Path(__file__).resolve().parent / "broken"
FILES = sorted(BROKEN.glob("job-*.toml")) + sorted(BROKEN.glob("site-*.toml"))


def _expected(path: Path) -> tuple[int, list[str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return int(lines[0].removeprefix("# exit ")), [line[2:] for line in lines if line.startswith("# error: ")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_broken_file(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BROKEN)
    job, site = (path.name, "local") if path.name.startswith("job-") else ("good-job.toml", path.name)
    code = main(["check", job, "--site", site])
    printed = capsys.readouterr()
    assert (code, printed.err.splitlines()) == _expected(path)
    assert code in (2, 4) and printed.err.startswith(f"error: {path.name}: ")
    assert printed.out == ""


def test_there_are_enough_and_the_good_job_is_good(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BROKEN)
    assert len(FILES) >= 60
    assert main(["check", "good-job.toml", "--site", "local"]) == 0
    assert capsys.readouterr().err == ""


SETTINGS = [
    (["resources.nodes"], "--set: not KEY=VALUE (resources.nodes); write for example resources.nodes=2"),
    (["=4"], "--set: not a dotted key (); write for example resources.nodes=2"),
    (["site=4"], "--set: not a dotted key (site); write for example resources.nodes=2"),
    (["a b=4"], "--set: not a dotted key (a b); write for example resources.nodes=2"),
    (["x=1\ny=2"], '--set: x: unknown key ("1\\ny=2"); valid here: '),
    (["resources.nodes=four"], '--set: resources.nodes: must be a whole number ("four"); write for example nodes = 2'),
    (
        ["checkpoint.async=yes"],
        '--set: checkpoint.async: must be true or false ("yes"); write for example async = true',
    ),
    (["resources.time=4 hours"], '--set: resources.time: not a duration ("4 hours"); write "4h"'),
    (["resources.time=2m30"], '--set: resources.time: not a duration ("2m30"); write for example "36h"'),
    (["resource.nodes=4"], "--set: resource: unknown key; did you mean resources? valid here: "),
    (["site.storage.runs_rot=x"], '--set: storage.runs_rot: unknown key ("x"); did you mean runs_root? valid here: '),
    (["site.default_partition=x"], '--set: default_partition: not a name of [partitions] ("x"); there are: local'),
    (["resources.partition=gpu"], "--set: resources.partition: no such partition at local (gpu); local has: local"),
]


@pytest.mark.parametrize(("settings", "expected"), SETTINGS, ids=lambda value: str(value)[:24])
def test_broken_setting(
    settings: Sequence[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BROKEN)
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["check", "good-job.toml", "--site", "local", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")


VARIABLES = [
    (
        "CFE_IROPE_GROUP",
        "3",
        "CFE_IROPE_GROUP: unknown variable (3); did you mean CFE_IROPE_GROUPS? rename or unset it",
    ),
    ("CFE_LAUNCHER", "mpi", 'CFE_LAUNCHER: launch.launcher: is none of the choices ("mpi"); choose from "srun", '),
    ("CFE_PROM_PORT", "web", 'CFE_PROM_PORT: metrics.port: must be a whole number ("web"); write for example port ='),
    ("CFE_PROM_ENABLED", "maybe", "CFE_PROM_ENABLED: is neither on nor off (maybe); set it to 1 or 0"),
    ("CFE_OTEL_ENDPOINT", "collector", 'CFE_OTEL_ENDPOINT: metrics.otlp_endpoint: is no URL ("collector"); write for'),
    (
        "CFE_DS_CONFIG",
        "none.json",
        "CFE_DS_CONFIG: none.json: cannot be read: No such file or directory; check the path",
    ),
    ("CFE_DS_CONFIG", "bad.json", "CFE_DS_CONFIG: bad.json: not valid JSON: Expecting "),
    ("CFE_DS_CONFIG", "list.json", "CFE_DS_CONFIG: list.json: is no JSON object; write "),
    ("CFE_DS_CONFIG", "bad.toml", "CFE_DS_CONFIG: bad.toml: not valid TOML: "),
    (
        "CFE_DS_CONFIG",
        "owned.json",
        "CFE_DS_CONFIG: engine.deepspeed.train_batch_size: is written by cfe_hpc (8); take",
    ),
    ("CFE_SITE", "locl", "locl: no such site profile; did you mean local? give a path, or one of: "),
]


@pytest.mark.parametrize(("name", "value", "expected"), VARIABLES)
def test_broken_variable(
    name: str,
    value: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file, text in {
        "bad.json": "{",
        "list.json": "[1]",
        "bad.toml": "x",
        "owned.json": '{"train_batch_size": 8}',
    }.items():
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    assert main(["check", str(BROKEN / "good-job.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")


FILES_THAT_ARE_NOT = [
    ("nowhere/job.toml", "nowhere/job.toml: no such job file; give a path, or one of: "),
    ("train_sec", "train_sec: no such job file; did you mean train_seq? give a path, or one of: "),
    ("folder", "folder: is a folder, not a job file; name a TOML file"),
    ("latin1.toml", "latin1.toml: not UTF-8 text (byte 8); save the file as UTF-8"),
]


@pytest.mark.parametrize(("ref", "expected"), FILES_THAT_ARE_NOT)
def test_no_such_job_file(
    ref: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin1.toml").write_bytes('name = "é"'.encode("latin-1"))
    assert main(["check", ref, "--site", "local"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")


def test_everything_wrong_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text('name = "j"\n[resources]\nnodes = 0\n')
    (tmp_path / "site.toml").write_text('name = "s"\nscheduler = "x"\n')
    monkeypatch.setenv("CFE_PROM_PORT", "x")
    assert main(["check", "job.toml", "--site", "site.toml", "--set", "recovery.failures=-1", "--set", "nothing"]) == 2
    places = [line.split(": ")[1:3] for line in capsys.readouterr().err.splitlines()]
    assert places == [
        ["--set", "not KEY=VALUE (nothing); write for example resources.nodes=2"],
        ["site.toml", "scheduler"],
        ["site.toml", "default_partition"],
        ["site.toml", "partitions"],
        ["site.toml", "hardware"],
        ["job.toml", "resources.nodes"],
        ["--set", "recovery.failures"],
        ["CFE_PROM_PORT", "metrics.port"],
        ["job.toml", "entry"],
    ]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["params.step=10"], "params.step: unknown key"),
        (["params.d_model=100", "params.heads=3"], "params.d_model: does not divide"),
        (["resources.devices_per_node=3"], "params.global_batch: does not divide"),
    ],
)
def test_parameters_of_the_shipped_training_are_checked(
    settings: Sequence[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["check", "train_seq", "--site", "local", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f": {key}" in line
