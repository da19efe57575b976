"""`watch` in a real terminal of 80 columns: what it shows, its keys, and a new size. squeue and sinfo are scripts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from run_specs import run_spec
from terminal import Terminal

from cfe_hpc.launch.occupancy import Occupancy
from cfe_hpc.reports.status import RunStatus, SchedulerWord
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.screen import cells
from cfe_hpc.screen.feed import Feed, Line

QUEUE = """\
41|RUNNING|x|n[1-4]|None
42|PENDING|N/A||Resources
43|RUNNING|x|n9|None
44|PENDING|N/A||JobHeldUser
"""
NODES = "gpu|up|12/3/1/16\ndebug|down|0/0/4/4\n"


class Desk:
    """Some runs of a user, and Slurm's commands, which note what they are told."""

    def __init__(self, root: Path) -> None:
        self.root, self.programs = root, root / "bin"
        self.programs.mkdir()
        self.calls = root / "calls"
        self.calls.touch()
        for name, printed in (("squeue", QUEUE), ("sinfo", NODES), ("scancel", "")):
            script = f'#!/bin/sh\necho {name} "$*" >> {self.calls}\ncat <<"END"\n{printed}END\n'
            (self.programs / name).write_text(script)
            (self.programs / name).chmod(0o755)
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(root / "cache")}
        self.training = self.run("train", 1, job_id="41", age_s=1.0)
        self.run("wait", 2, job_id="42")
        self.run("stuck", 3, job_id="43", age_s=700.0)
        self.run("held", 4, job_id="44")
        done = self.run("done", 5, job_id="40")
        done.write_result({"state": "COMPLETED", "final_step": 100, "goodput": 0.91, "lost_steps": 0})

    def run(self, name: str, number: int, *, job_id: str, age_s: float | None = None) -> RunFolder:
        folder = RunFolder(self.root / "runs" / name / f"{name}-20260131-2359{number:02d}-ab{number:02d}")
        for path in (folder.control, folder.logs):
            path.mkdir(parents=True)
        folder.run_toml.write_text(run_spec(run_id=folder.run_id, scheduler="slurm").dump())
        folder.promise("job", job_id=job_id, scheduler="slurm", attempt_base=0)
        if age_s is not None:
            detail = {"job_id": job_id, "total_steps": 1000}
            folder.append_event("started", attempt=0, host="n1", detail=detail)
            for step in range(1, 31):
                self.beat(folder, step, age_s + 30 - step)
        return folder

    def beat(self, folder: RunFolder, step: int, age_s: float = 0.0) -> None:
        at = datetime.fromtimestamp(time.time() - age_s, timezone.utc).isoformat().replace("+00:00", "Z")
        beat = {"time": at, "attempt": 0, "step": step, "loss": 10.0 - 0.1 * step, "step_seconds": 1.0}
        with open(folder.heartbeat_path, "a") as stream:
            stream.write(json.dumps({**beat, "tokens_per_second": 123456.0, "spent": {"step": 1.0}}) + "\n")

    def called(self, name: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(f"{name} ")]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def terminal(desk: Desk) -> Iterator[Terminal]:
    """`watch` in a terminal, its first picture there."""
    with Terminal([sys.executable, "-m", "cfe_hpc", "watch"], cwd=desk.root, env=desk.env) as found:
        found.wait_for("train-ab01", "q quit", timeout_s=60)
        yield found


def row(screen: str, name: str) -> list[str]:
    return next(line for line in screen.splitlines() if line.startswith(name)).split()


def test_what_it_shows_in_80_columns(desk: Desk, terminal: Terminal) -> None:
    shown = terminal.wait_for("gpu ")
    lines = shown.splitlines()
    assert lines[0].startswith("cfe-hpc watch  2 running  1 pending  1 held  1 completed  1 STALLED")
    assert [line.split()[0] for line in lines[2:7]] == [
        "stuck-ab03",
        "held-ab04",
        "train-ab01",
        "wait-ab02",
        "done-ab05",
    ]
    assert row(shown, "train-ab01")[:4] == ["train-ab01", "RUNNING", "30/1000", "█▇▆▅▄▃▂▁"]
    assert row(shown, "train-ab01")[-1] == "n[1-4]"
    assert row(shown, "stuck-ab03")[1] == "STALLED" and "no step for 11m" in " ".join(row(shown, "stuck-ab03"))
    assert row(shown, "held-ab04")[1] == "HELD" and row(shown, "held-ab04")[-1] == "JobHeldUser"
    assert row(shown, "wait-ab02")[1] == "PENDING" and row(shown, "wait-ab02")[-1] == "Resources"
    assert row(shown, "done-ab05")[1:] == ["COMPLETED", "100", "91%", "-"]
    assert "12/16 nodes in use, 1 down" in shown and "0/4 nodes in use, 4 down; closed" in shown
    assert lines[-1].split() == ["l", "log", "s", "save", "c", "cancel", "q", "quit"]
    assert max(map(len, lines)) <= 80


def test_it_goes_on_by_itself_and_asks_squeue_no_more_than_the_site_likes(desk: Desk, terminal: Terminal) -> None:
    (desk.root / "runs" / "wait").rename(desk.root / "elsewhere")
    desk.beat(desk.training, 31)
    terminal.wait_for("31/1000", gone=["wait-ab02"])
    assert (len(desk.called("squeue")), len(desk.called("sinfo"))) == (1, 1)
    terminal.press("q")
    assert terminal.wait_end() == 0


def test_another_size(terminal: Terminal) -> None:
    terminal.resize(30, 150)
    wide = terminal.wait_for("TRY", "NODES")
    assert "train-20260131-235901-ab01" in wide and max(map(len, wide.splitlines())) > 100
    terminal.resize(20, 60)
    narrow = terminal.wait_for("train-ab01", gone=["TRY"])
    assert max(map(len, narrow.splitlines())) <= 60


def test_the_log_of_the_run_that_is_chosen(desk: Desk, terminal: Terminal) -> None:
    terminal.press("\x1b[B\x1b[B")
    terminal.wait_for("train-20260131-235901-ab01", "loss 7", "123k tokens/s", "left")
    log = desk.training.logs / "41.0.0.out"
    log.write_text("2026-01-31T10:00:00Z the first line\n")
    terminal.press("l")
    terminal.wait_for("log of train-20260131-235901-ab01", "0.0 2026-01-31T10:00:00Z the first line")
    with open(log, "a") as stream:
        stream.write("[bold]no markup[/bold]\n")
    terminal.wait_for("[bold]no markup[/bold]")
    terminal.press("\x1b")
    terminal.wait_for("RUN ", "gpu ")


def test_cancel_asks_first(desk: Desk, terminal: Terminal) -> None:
    terminal.press("\x1b[B\x1b[B\x1b[B")  # the one that waits
    terminal.wait_for("wait-20260131-235902-ab02")
    terminal.press("c")
    terminal.wait_for("Cancel wait-20260131-235902-ab02 for good?")
    terminal.press("n")
    terminal.wait_for("gpu ", gone=["for good?"])
    assert desk.called("scancel") == []
    terminal.press("c")
    terminal.wait_for("for good?")
    terminal.press("y")
    terminal.wait_for("never to be requeued")
    assert desk.called("scancel") == ["scancel 42"]
    terminal.wait_for("1 cancelled")


def test_save_is_asked_for_and_refused_where_nothing_trains(desk: Desk, terminal: Terminal) -> None:
    terminal.press("\x1b[B\x1b[B")
    terminal.wait_for("train-20260131-235901-ab01")
    terminal.press("s")
    terminal.wait_for("saves at its next step")
    assert (desk.training.promised("save") or {})["attempt"] == 0
    terminal.press("\x1b[B")
    terminal.wait_for("wait-20260131-235902-ab02")
    terminal.press("s")
    terminal.wait_for("it saves when")


def test_one_run_alone(desk: Desk) -> None:
    argv = [sys.executable, "-m", "cfe_hpc", "watch", "train"]
    with Terminal(argv, cwd=desk.root, env=desk.env) as terminal:
        shown = terminal.wait_for("train-ab01", "1 running")
        assert "stuck" not in shown


def test_a_sweep_is_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('name = "sweep"\ncommand = ["true"]\nrecovery.preflight = false\n')
    words = ["submit", "job.toml", "--sweep", "params.x=1,2", "--max-parallel", "2", "--wait", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "cfe_hpc", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    sweep = RunFolder(Path(json.loads(done.stdout)["run_dir"]))
    asked: list[Any] = []

    def ask(live: Any) -> tuple[dict[str, SchedulerWord], list[str]]:
        asked.append(live)
        return {}, []

    picture = Feed(roots=[], ask=ask, only=sweep).picture()
    assert [line.status.run_id for line in picture.lines] == [f"{sweep.run_id}.{task:06d}" for task in (1, 0)]
    assert picture.counts == {"COMPLETED": 2}
    assert len(asked) == 1


def test_it_needs_a_terminal(desk: Desk) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cfe_hpc", "watch"], cwd=desk.root, env=desk.env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: watch: this is no terminal; use `cfe-hpc status`, with --json for programs\n"


def test_without_slurm_and_without_runs(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = {**os.environ, "PATH": str(tmp_path / "bin"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with Terminal([sys.executable, "-m", "cfe_hpc", "watch"], cwd=tmp_path, env=env) as terminal:
        terminal.wait_for("no runs yet", "q quit")
        terminal.press("lsc")
        terminal.press("q")
        assert terminal.wait_end() == 0


def status(**facts: Any) -> RunStatus:
    plain: dict[str, Any] = {
        "run_id": "train-20260131-235959-abcd",
        "state": "RUNNING",
        "job_id": "1",
        "attempt": 0,
        "step": 5,
        "total_steps": 10,
        "lost_steps": 0,
        "goodput": 1.0,
        "heartbeat_age_s": 1.0,
        "reason": "",
        "run_dir": "/",
        "buckets": {},
    }
    return RunStatus(**{**plain, **facts})


@pytest.mark.parametrize("width", range(40, 200, 7))
def test_cells_keep_to_their_columns(width: int) -> None:
    long = status(
        run_id="a-name-of-a-job-that-never-ends-and-goes-on-and-on-20260131-235959-abcd",
        state="COMPLETED",
        job_id="12345678901234",
        attempt=123,
        step=123_456_789,
        total_steps=1_000_000_000,
        heartbeat_age_s=1e9,
        reason="a reason\nof two lines and of more words than anybody reads" * 3,
    )
    line = Line(status=long, losses=(1e-12, 123456.789), nodes="node[0001-0999]," * 9)
    columns = cells.columns(width)
    assert all(len(column.text(line)) <= column.width for column in columns), width
    assert sum(column.width + 1 for column in columns) <= max(width, 62)
    assert len({column.title for column in columns}) == len(columns)


def test_small_words() -> None:
    assert [cells.age(seconds) for seconds in (None, 0.4, 59, 60, 3600, 90_000)] == ["-", "0s", "59s", "1m", "1h", "1d"]
    assert [cells.count(number) for number in (0, 999, 12_345, 4_560_000)] == ["0", "999", "12.3k", "4.56M"]
    name = "train-seq-20260131-235959-abcd"
    assert [cells.short_name(name, width) for width in (40, 14, 10)] == [name, "train-seq-abcd", "trai…-abcd"]
    assert cells.short_name(f"{name}.000012", 20) == "train-s…-abcd.000012"


def test_the_course_of_a_loss() -> None:
    assert cells.sparkline([], 8) == ""
    assert cells.sparkline([1.0, 1.0], 8) == "▁▁"
    assert cells.sparkline([3.0, 2.0, 1.0], 8) == "█▅▁"
    many = cells.sparkline([float(number) for number in range(1000)], 8)
    assert len(many) == 8 and many[0] == "▁" and many[-1] == "█"
    assert len(cells.sparkline([float(number) for number in range(13)], 8)) <= 8


def test_bars_of_partitions() -> None:
    half = Occupancy(partition="p", up=True, allocated=5, idle=5, other=0, total=10)
    assert cells.partition(half, 10) == "█████····· 5/10 nodes in use"
    none = Occupancy(partition="p", up=True, allocated=0, idle=0, other=0, total=0)
    assert cells.partition(none, 4) == "···· 0/0 nodes in use"
    assert shlex.split(cells.partition(half, 10))[0] == "█████·····"
