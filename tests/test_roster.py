"""`status` over many runs: what has ended is read once, the scheduler is asked once, and memory stays flat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_specs import run_spec

from cfe_hpc.caches import cache_folder
from cfe_hpc.cli.main import main
from cfe_hpc.launch.jobs import latest_job
from cfe_hpc.reports.roster import Roster
from cfe_hpc.reports.status import RunStatus, SchedulerWord
from cfe_hpc.runfolder import RunFolder

Words = dict[str, SchedulerWord]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runs root in the current folder, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def make(root: Path, number: int, *, job: str = "a", result: dict[str, Any] | None = None) -> RunFolder:
    folder = RunFolder(root / job / f"{job}-20260131-{number:06d}-abcd")
    folder.control.mkdir(parents=True)
    folder.run_toml.write_text(run_spec(run_id=folder.run_id, scheduler="slurm").dump())
    folder.promise("job", job_id=str(number), scheduler="slurm", attempt_base=0)
    detail = {"job_id": str(number), "total_steps": 40}
    folder.append_event("started", attempt=0, host="n1", detail=detail)
    beat = {"time": "2026-01-31T10:00:00.000Z", "attempt": 0, "step": 7, "step_seconds": 0.5}
    folder.heartbeat_path.write_text(json.dumps(beat) + "\n")
    if result is not None:
        folder.write_result({"final_step": 40, "lost_steps": 0, "goodput": 0.5, **result})
    return folder


def look(root: Path, words: Words | None = None) -> tuple[list[str], dict[str, RunStatus]]:
    """(jobs that were to be asked about, the statuses by job id, oldest first)."""
    roster = Roster([root], latest_job)
    asked = [str(job["job_id"]) for _, job in roster.unsettled()]
    return asked, {str(status.job_id): status for status in roster.statuses(words or {})}


def blind(folder: RunFolder) -> None:
    """Take away all that a status is read from, but for what tells whether it changed."""
    for path in (folder.events_path, folder.heartbeat_path):
        path.unlink()
    marks = folder.control.stat()
    (folder.control / "job").unlink()
    os.utime(folder.control, ns=(marks.st_atime_ns, marks.st_mtime_ns))


def test_what_has_ended_is_read_once(root: Path) -> None:
    ended = [make(root, number, result={"state": "COMPLETED"}) for number in (3, 1, 2)]
    first = look(root)
    for folder in ended:
        blind(folder)
    asked, second = look(root)
    assert (asked, list(second)) == ([], ["1", "2", "3"])
    for job_id, status in second.items():
        before = first[1][job_id]
        assert status.heartbeat_age_s == pytest.approx(before.heartbeat_age_s, abs=30)
        fields = [name for name in RunStatus.__slots__ if name != "heartbeat_age_s"]
        assert [getattr(status, name) for name in fields] == [getattr(before, name) for name in fields]


def test_what_goes_on_again_is_read_anew(root: Path) -> None:
    again, resent, other = (make(root, number, result={"state": "FAILED", "reason": "x"}) for number in (1, 2, 3))
    look(root)
    again.reopen()
    resent.promise("job-1", job_id="22", scheduler="slurm", attempt_base=1)
    other.write_result({"state": "CANCELLED", "final_step": 8})
    asked, statuses = look(root, {"1": SchedulerWord(state="RUNNING")})
    assert asked == ["1"]
    assert {job: (each.state, each.step) for job, each in statuses.items()} == {
        "1": ("RUNNING", 7),
        "22": ("FAILED", 40),
        "3": ("CANCELLED", 8),
    }


def test_held_runs_are_remembered_until_they_are_let_go(root: Path) -> None:
    held = make(root, 1)
    held.promise("held", reason="the same first error twice")
    look(root)
    blind(held)
    assert look(root)[1].popitem()[1].reason == "the same first error twice"
    (held.control / "held").unlink()
    make(root, 2)
    assert look(root)[0] == ["2"]


def test_new_and_removed_runs(root: Path) -> None:
    for number in (1, 3):
        make(root, number, result={"state": "COMPLETED"})
    make(root, 4)
    look(root)
    make(root, 2, job="b", result={"state": "COMPLETED"})
    make(root, 5, result={"state": "COMPLETED"})
    assert list(look(root)[1]) == ["1", "2", "3", "4", "5"]
    shutil.rmtree(root / "a")
    assert list(look(root)[1]) == ["2"]
    assert list(look(root)[1]) == ["2"]


def test_a_job_that_vanished_a_week_ago_is_asked_about_no_more(root: Path) -> None:
    old, new = make(root, 1), make(root, 2)
    long_ago_s = time.time() - 8 * 86_400
    for path in (old.control, old.events_path, old.heartbeat_path):
        os.utime(path, (long_ago_s, long_ago_s))
    assert look(root)[0] == ["1", "2"]
    asked, statuses = look(root)
    assert asked == ["2"]
    assert {each.state for each in statuses.values()} == {"FAILED"}
    assert statuses["1"].reason.startswith("vanished: the scheduler no longer knows job 1")
    old.promise("job-1", job_id="11", scheduler="slurm", attempt_base=1)
    assert look(root)[0] == ["11", "2"]
    assert new.result() is None


def test_a_scheduler_that_is_silent_settles_nothing(root: Path) -> None:
    old = make(root, 1)
    for path in (old.control, old.events_path, old.heartbeat_path):
        os.utime(path, (1e9, 1e9))
    silent = {"1": SchedulerWord(state="UNKNOWN", reason="the scheduler gave no answer")}
    assert look(root, silent)[1]["1"].state == "RUNNING"
    assert look(root)[0] == ["1"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\n", b"a\tb\n", b"a\tb\t{\n", b"a\tb\t{}\textra\n", b'a\tb\t{"x":1}\n']
)
def test_a_damaged_memory_is_made_anew(root: Path, content: bytes) -> None:
    make(root, 1, result={"state": "COMPLETED"})
    look(root)
    folder = cache_folder()
    assert folder is not None
    (index,) = folder.glob("runs-*.tsv")
    whole = index.read_bytes()
    index.write_bytes(content)
    assert look(root)[1]["1"].state == "COMPLETED"
    assert index.read_bytes() == whole


def test_a_damaged_row_is_read_anew(root: Path) -> None:
    make(root, 1, result={"state": "COMPLETED"})
    look(root)
    folder = cache_folder()
    assert folder is not None
    (index,) = folder.glob("runs-*.tsv")
    mark, path, _ = index.read_text().split("\t")
    for row in ("{}", '{"run_id":1}', "{x}"):
        index.write_text(f"{mark}\t{path}\t{row}\n")
        assert look(root)[1]["1"].state == "COMPLETED"


def test_what_one_cluster_has_forgotten_another_may_know(root: Path) -> None:
    old = make(root, 1)
    for path in (old.control, old.events_path, old.heartbeat_path):
        os.utime(path, (1e9, 1e9))
    for _ in range(2):
        look(root)
    assert look(root)[0] == []
    assert [job["job_id"] for _, job in Roster([root], latest_job, cluster="other").unsettled()] == ["1"]


def test_names_that_would_break_the_memory_are_read_each_time(root: Path) -> None:
    make(root, 1, job="tab\there", result={"state": "COMPLETED"})
    make(root, 2, result={"state": "COMPLETED"})
    for _ in range(2):
        assert list(look(root)[1]) == ["1", "2"]


def test_it_works_where_nothing_can_be_remembered(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    make(root, 1, result={"state": "COMPLETED"})
    make(root, 2)
    for _ in range(2):
        assert look(root, {"2": SchedulerWord(state="PENDING")})[0] == ["2"]


def test_an_interrupted_look_leaves_what_was_remembered(root: Path) -> None:
    for number in range(3):
        make(root, number, result={"state": "COMPLETED"})
    look(root)
    folder = cache_folder()
    assert folder is not None
    make(root, 9, result={"state": "COMPLETED"})
    roster = Roster([root], latest_job)
    roster.unsettled()
    statuses = roster.statuses({})
    next(statuses)
    statuses.close()
    (index,) = folder.glob("*runs-*")
    assert len(index.read_text().splitlines()) == 3


def test_the_table_shows_the_newest_that_ended_and_all_that_have_not(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = make(root, 1)
    waiting.promise("held", reason="see the log")
    for number in range(2, 60):
        make(root, number, result={"state": "COMPLETED"})
    assert main(["status"]) == 0
    heading, first, *rows, last = capsys.readouterr().out.splitlines()
    assert heading.startswith("RUN ") and first.startswith(waiting.run_id)
    assert len(rows) == 50 and rows[-1].startswith("a-20260131-000059")
    assert last == "(8 that ended before: `cfe-hpc status --all`)"
    assert main(["status", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 60
    assert main(["status", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 59


_PEAK = """\
import sys
from cfe_hpc.cli.main import main
main(["status", "--json"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def test_memory_hardly_grows_with_the_number_of_runs(root: Path) -> None:
    def peak_kib() -> int:
        done = subprocess.run(
            [sys.executable, "-c", _PEAK], cwd=root.parent, capture_output=True, text=True, check=True
        )
        return int(done.stderr)

    make(root, 1, result={"state": "COMPLETED", "reason": "x" * 1000})
    few = peak_kib()
    [made] = (root / "a").iterdir()
    for number in range(2, 1500):
        shutil.copytree(made, root / "a" / f"a-20260131-{number:06d}-abcd", copy_function=os.link)
    # Their rows alone are 2 MiB, and thrice that as objects.
    assert max(peak_kib(), peak_kib()) < few + 2000
