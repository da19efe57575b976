"""`doctor` with Slurm's commands and the Pushgateway faked or real, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Pushgateway

from cfe_hpc.cli.main import main

SITE = """
name = "here"
scheduler = "{scheduler}"
default_partition = "p"
partitions.p.hardware = "h"
hardware.h = {{ accelerator = "cpu", devices_per_node = 1, cores_per_node = 1, memory = "1GiB" }}
storage.runs_root = "{runs_root}"
{more}
"""


@pytest.fixture(autouse=True)
def _no_slurm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with nothing on it."""
    if "pushgateway" in request.fixturenames:
        request.getfixturevalue("pushgateway")  # while its program can be found
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)


def program(name: str, script: str) -> None:
    path = Path("bin") / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def doctor(
    capsys: pytest.CaptureFixture[str], *, code: int, scheduler: str = "slurm", runs_root: str = "runs", more: str = ""
) -> dict[str, dict[str, Any]]:
    Path("site.toml").write_text(SITE.format(scheduler=scheduler, runs_root=runs_root, more=more))
    assert main(["doctor", "--site", "site.toml", "--json"]) == code
    return {answer["can"]: answer for answer in json.loads(capsys.readouterr().out)}


def test_a_machine_without_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    answers = doctor(capsys, code=3)
    slurm = answers["use Slurm's commands"]
    assert not slurm["ok"] and slurm["reason"].startswith("not on PATH: sbatch, srun, squeue, scontrol, scancel; ")
    assert answers["run cfe_hpc"]["ok"] and answers["write run folders"]["ok"] and answers["train on cpu here"]["ok"]
    assert not Path("runs").exists()


def test_a_local_site_needs_no_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    answers = doctor(capsys, code=0, scheduler="local")
    assert not answers["use Slurm's commands"]["ok"]


def test_a_cluster_that_answers(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sbatch", "srun", "squeue", "scancel"):
        program(name, "exit 0")
    program("scontrol", "echo slurm 24.05.3")
    program("sinfo", 'printf "gpu* 4\\nspot 2\\n"')
    program("sacctmgr", "echo 'sacctmgr: error: no slurmdbd' >&2; exit 1")
    answers = doctor(capsys, code=0)
    assert answers["use Slurm's commands"]["reason"] == f"slurm 24.05.3 at {Path('bin').resolve()}"
    assert answers["reach the controller"]["reason"] == "sinfo lists 2 partitions: gpu*, spot"
    accounting = answers["read Slurm's accounting"]
    assert not accounting["ok"] and accounting["reason"].endswith("sacctmgr: error: no slurmdbd")
    assert "words that this version does not know" in answers["trust the profile"]["reason"]


def test_a_profile_that_is_out_of_date(capsys: pytest.CaptureFixture[str]) -> None:
    captured = Path(__file__).resolve().parent / "captured" / "slurm-22.05.8"
    for name in ("sbatch", "srun", "squeue", "scancel", "sinfo", "sacctmgr"):
        program(name, "exit 0")
    program("scontrol", f'[ -z "$2" ] && exit 0; while read -r line; do echo "$line"; done < "{captured}/$2.txt"')
    profile = doctor(capsys, code=0)["trust the profile"]
    assert not profile["ok"]
    assert profile["reason"].startswith("2 keys differ, partitions.p first; `cfe-hpc sites check here`")


def test_a_runs_root_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    root = "/proc/runs"
    answers = doctor(capsys, code=1, scheduler="local", runs_root=root)
    assert answers["write run folders"]["reason"].startswith(f"{root}: ")


def test_the_pushgateway_that_the_site_names(
    pushgateway: Pushgateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f'metrics.pushgateway = "{pushgateway.url}"'
    answers = doctor(capsys, code=0, scheduler="local", more=more)
    assert answers["reach the Pushgateway"]["reason"] == f"{pushgateway.url} is ready"
    monkeypatch.setenv("CFE_PUSHGATEWAY_USER", "me")
    answers = doctor(capsys, code=1, scheduler="local", more=more)
    assert "is set without a password" in answers["reach the Pushgateway"]["reason"]
    monkeypatch.delenv("CFE_PUSHGATEWAY_USER")
    pushgateway.process.kill()
    pushgateway.process.wait()
    answers = doctor(capsys, code=1, scheduler="local", more=more)
    assert "Connection refused" in answers["reach the Pushgateway"]["reason"]


def test_a_password_file_must_be_its_owners_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = Path("secret")
    secret.write_text("s3cret\n")
    secret.chmod(0o640)
    monkeypatch.setenv("CFE_PUSHGATEWAY_USER", "me")
    monkeypatch.setenv("CFE_PUSHGATEWAY_PASSWORD_FILE", str(secret))
    more = 'metrics.pushgateway = "http://127.0.0.1:9"'
    reason = doctor(capsys, code=1, scheduler="local", more=more)["reach the Pushgateway"]["reason"]
    assert "can be read by others" in reason and "chmod 600" in reason and "s3cret" not in reason
    secret.chmod(0o600)
    assert "refused" in doctor(capsys, code=1, scheduler="local", more=more)["reach the Pushgateway"]["reason"]


def test_the_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Path("site.toml").write_text(SITE.format(scheduler="slurm", runs_root="runs", more=""))
    assert main(["doctor", "--site", "site.toml"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("site here (")
    assert any(line.startswith("scheduler  NO   use Slurm's commands: not on PATH") for line in lines)
    assert any(line.startswith("devices    yes  train on cpu here: ") for line in lines)


def test_it_loads_no_framework(tmp_path: Path) -> None:
    Path("site.toml").write_text(SITE.format(scheduler="local", runs_root="runs", more=""))
    code = (
        "import sys; from cfe_hpc.cli.main import main; main(['doctor', '--site', 'site.toml']);"
        "main(['status', '--site', 'site.toml']);"
        "print(sorted({'torch', 'deepspeed', 'h5py', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == "[]"
