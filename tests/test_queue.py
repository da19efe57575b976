"""How often squeue and sacct are asked, and about what; both are scripts that note their arguments."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from cfe_hpc import caches
from cfe_hpc.errors import SchedulerError
from cfe_hpc.launch.occupancy import occupancy
from cfe_hpc.launch.queue import forget_queue, poll_interval_s, queue
from cfe_hpc.runfolder import RunFolder


class Programs:
    """Slurm's commands, as scripts in a folder of their own on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def write(self, name: str, printed: str, *, status: int = 0) -> None:
        calls = self.folder / f"{name}.calls"
        script = f'#!/bin/sh\nprintf "%s\\n" "$*" >> {calls}\ncat <<"END"\n{printed}END\nexit {status}\n'
        (self.folder / name).write_text(script)
        (self.folder / name).chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """No command of Slurm's but those written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{found.folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    for name in ("squeue", "sacct", "sinfo"):
        if any(Path(folder, name).exists() for folder in ("/usr/bin", "/bin")):
            found.write(name, "", status=1)  # not the real one
    return found


def age(tmp_path: Path, pattern: str) -> None:
    """Make what is kept old."""
    for path in (tmp_path / "cache" / "cfe_hpc").glob(pattern):
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def test_one_answer_serves_until_it_is_too_old(programs: Programs, tmp_path: Path) -> None:
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n2|PENDING|N/A||Priority\n")
    for _ in range(3):
        assert {job: each.state for job, each in queue(["1", "2"], max_age_s=60).items()} == {
            "1": "RUNNING",
            "2": "PENDING",
        }
    assert queue(["2"], max_age_s=60)["2"].reason == "Priority"
    assert len(programs.calls("squeue")) == 1
    queue(["1"])
    assert len(programs.calls("squeue")) == 2
    age(tmp_path, "squeue-*")
    queue(["1"], max_age_s=60)
    assert len(programs.calls("squeue")) == 3


def test_a_job_that_was_not_asked_about_is_asked_about_with_the_others(programs: Programs) -> None:
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n3|RUNNING|N/A|n1|None\n")
    queue(["1", "2"], max_age_s=60)
    assert list(queue(["3"], max_age_s=60)) == ["3"]
    assert list(queue(["1", "2"], max_age_s=60)) == ["1"]
    assert ["--jobs=1,2 " in programs.calls("squeue")[0], "--jobs=1,2,3 " in programs.calls("squeue")[1]] == [True] * 2
    assert len(programs.calls("squeue")) == 2


def test_whoever_changes_a_job_has_the_answer_forgotten(programs: Programs) -> None:
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n")
    queue(["1"], max_age_s=60)
    programs.write("squeue", "1|CANCELLED|N/A||None\n")
    assert queue(["1"], max_age_s=60)["1"].state == "RUNNING"
    forget_queue()
    assert queue(["1"], max_age_s=60)["1"].state == "CANCELLED"


def test_another_cluster_is_asked_for_itself(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n")
    queue(["1"], max_age_s=60)
    (tmp_path / "slurm.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    queue(["1"], max_age_s=60)
    assert len(programs.calls("squeue")) == 2


def test_a_refusal_is_not_kept(programs: Programs) -> None:
    programs.write("squeue", "", status=1)
    for _ in range(2):
        with pytest.raises(SchedulerError, match="squeue"):
            queue(["1"], max_age_s=60)
    assert len(programs.calls("squeue")) == 2


def test_more_jobs_than_an_argument_holds_are_asked_about_by_their_user(programs: Programs) -> None:
    programs.write("squeue", "77777|RUNNING|N/A|n1|None\n")
    wanted = [str(number) for number in range(50_000, 90_000)]
    assert list(queue(wanted, max_age_s=60)) == ["77777"]
    (call,) = programs.calls("squeue")
    assert f"--user={os.geteuid()} " in call and len(call) < 200


def test_accounting_is_asked_about_what_squeue_forgot_and_once(programs: Programs, tmp_path: Path) -> None:
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n")
    ended = "2|TIMEOUT|n1\n3|CANCELLED by 1000|None assigned\n4|RUNNING|n2\n6|COMPLETED|n1\n7|NODE_FAIL|n1\n"
    programs.write("sacct", ended)
    for _ in range(2):
        known = queue(["1", "2", "3", "4", "5"], max_age_s=60, accounting=True)
        assert {job: (each.state, each.reason) for job, each in known.items()} == {
            "1": ("RUNNING", ""),
            "2": ("FAILED", "TIMEOUT, by accounting"),
            "3": ("CANCELLED", ""),
        }
        age(tmp_path, "squeue-*")
    (call,) = programs.calls("sacct")
    assert "--jobs=2,3,4,5 " in call
    age(tmp_path, "sacct-asked-*")
    queue(["1", "2", "3", "4", "5"], max_age_s=60, accounting=True)
    assert "--jobs=4,5 " in programs.calls("sacct")[1]


def test_without_accounting_it_works_the_same(programs: Programs) -> None:
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n")
    programs.write("sacct", "Slurm accounting storage is disabled\n", status=1)
    assert list(queue(["1", "2"], max_age_s=60, accounting=True)) == ["1"]
    (programs.folder / "sacct").unlink()
    assert list(queue(["1", "2"], max_age_s=60, accounting=True)) == ["1"]


def test_what_is_kept_is_its_owners_alone(programs: Programs, tmp_path: Path) -> None:
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n")
    queue(["1"], max_age_s=60)
    folder = tmp_path / "cache" / "cfe_hpc"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())]
    assert modes == [0o700, 0o600]


def test_nothing_is_kept_where_nothing_can_be(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    programs.write("squeue", "1|RUNNING|N/A|n1|None\n")
    assert caches.cache_folder() is None
    for _ in range(2):
        assert list(queue(["1"], max_age_s=60)) == ["1"]
    assert len(programs.calls("squeue")) == 2


def test_damaged_memory_is_no_memory(programs: Programs, tmp_path: Path) -> None:
    caches.remember("x", {"a": 1})
    assert caches.recall("x", max_age_s=60) == {"a": 1}
    for content in ("{", "[]", ""):
        (tmp_path / "cache" / "cfe_hpc" / "x").write_text(content)
        assert caches.recall("x", max_age_s=60) is None


def test_the_interval_is_that_of_the_runs_site(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert poll_interval_s(folder) == 10.0
    folder.run_toml.write_text("[site.slurm]\npoll_interval = 120.0\n")
    assert poll_interval_s(folder) == 120.0


def test_partitions_are_asked_about_once_a_minute(programs: Programs) -> None:
    programs.write("sinfo", "gpu|up|12/3/1/16\nbig|down|0/1.5K/0/1.5K\n")
    for _ in range(2):
        gpu, big = occupancy()
    assert (gpu.partition, gpu.up, gpu.allocated, gpu.idle, gpu.other, gpu.total) == ("gpu", True, 12, 3, 1, 16)
    assert (big.up, big.idle, big.total) == (False, 1536, 1536)
    assert len(programs.calls("sinfo")) == 1


def test_no_partitions_where_sinfo_gives_no_answer(programs: Programs) -> None:
    programs.write("sinfo", "", status=1)
    assert occupancy() == ()
