"""`gc`: what may go and what must stay, and a plan that is carried out exactly or not at all."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import put
from run_specs import run_spec
from slurm_programs import slurm
from spine.entries import Count

from cfe_hpc.checkpoints.keeping import pins
from cfe_hpc.cli.main import main
from cfe_hpc.launch.cleaning.choice import Item
from cfe_hpc.launch.cleaning.removal import remove
from cfe_hpc.launch.cleaning.trees import measure
from cfe_hpc.launch.jobs import all_jobs
from cfe_hpc.process import start_ticks
from cfe_hpc.ranks.jobrecords import record, record_job
from cfe_hpc.runfolder import RunFolder

__all__ = ["slurm"]  # a fixture

DAY_S = 86_400.0
CLOCK = count(100_000)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with a cache of its own for plans."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def age(path: Path, seconds: float) -> None:
    """Make everything in a folder look so old."""
    then_s = time.time() - seconds
    for each in [*path.rglob("*"), path]:
        os.utime(each, (then_s, then_s), follow_symlinks=False)


def new_run(name: str = "demo", *, state: str | None = "COMPLETED", days: float = 60, **spec: Any) -> RunFolder:
    """A run that ended so many days ago, with a file of a thousand bytes."""
    created = RunFolder.create(Path("runs").absolute(), name)
    # Those of one second have no order.
    folder = RunFolder(created.path.rename(created.path.with_name(f"{name}-20260131-{next(CLOCK):06d}-abcd")))
    resolved = run_spec(run_id=folder.run_id, name=name)
    resolved.model_copy(update=spec).write(folder.run_toml)
    (folder.logs / "1.0.0.out").write_bytes(b"x" * 1000)
    folder.append_event("started", attempt=0)
    if state is not None:
        folder.write_result({"state": state})
    age(folder.path, days * DAY_S)
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    """`cfe-hpc gc WORDS`; what it printed."""
    try:
        got = main(["gc", *map(str, words)])
    except SystemExit as end:  # argparse's
        got = int(end.code or 0)
    out, err = capsys.readouterr()
    assert got == code, err
    return out, err


def plan(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(call(capsys, "--plan", *words, "--json", code=code)[0])
    return document


def chosen(document: dict[str, Any]) -> set[Path]:
    return {Path(item["path"]) for item in document["items"]}


def why_kept(document: dict[str, Any]) -> dict[str, str]:
    return {each["run_id"]: each["why"] for each in document["kept"]}


def test_what_is_old_and_has_ended_is_planned_and_then_removed_and_nothing_else(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    old, failed = new_run(), new_run(state="FAILED")
    young, held = new_run(days=1), new_run(state="HELD")
    precious = here / "data"
    precious.mkdir()
    (precious / "tokens").write_text("mine")
    (old.path / "data").symlink_to(precious)
    age(old.path, 60 * DAY_S)
    found = plan(capsys)
    assert chosen(found) == {old.path, failed.path}
    assert old.path.exists() and failed.path.exists(), "a plan removes nothing"
    done = json.loads(call(capsys, found["plan"], "--json")[0])
    assert {Path(item["path"]) for item in done["removed"]} == {old.path, failed.path}
    assert (done["size_bytes"], done["stayed"]) == (found["size_bytes"], [])
    assert sorted(Path("runs/demo").iterdir()) == sorted(Path("runs/demo") / run.run_id for run in (young, held))
    assert (precious / "tokens").read_text() == "mine"
    assert "no such plan, or it was carried out" in call(capsys, found["plan"], code=2)[1]


def test_age_state_size_and_the_newest_of_each_job_choose(capsys: pytest.CaptureFixture[str]) -> None:
    old, failed, held, other = new_run(), new_run(state="FAILED"), new_run(state="HELD"), new_run("other")
    large = new_run(days=2)
    (large.path / "large").write_bytes(b"x" * 50_000)
    age(large.path, 2 * DAY_S)
    assert chosen(plan(capsys, "--older", "3d")) == {old.path, failed.path, other.path}
    assert chosen(plan(capsys, "--older", "3d", "--state", "FAILED", "--state", "HELD")) == {failed.path, held.path}
    assert chosen(plan(capsys, "--older", "1d", "--larger", "50kB")) == {large.path}
    kept = plan(capsys, "--older", "0s", "--keep-last", "1")
    assert other.path not in chosen(kept) and why_kept(kept)[other.run_id] == "is among the newest of its job"
    assert chosen(kept) == {old.path, failed.path}, "held runs are not asked for, and the large one is the newest"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Something that lives, as a supervisor does."""
    running = subprocess.Popen(["sleep", "60"])
    yield running
    running.kill()
    running.wait()


def test_a_run_that_lives_stays_and_so_does_all_that_it_needs(
    capsys: pytest.CaptureFixture[str], process: subprocess.Popen[bytes]
) -> None:
    followed, read, free = new_run(), new_run(), new_run()
    live = new_run(state=None, after=[str(followed.path)])
    spec = run_spec(run_id=live.run_id, name="demo", params={"data": [f"{read.path}/tokens.h5"]})
    spec.model_copy(update={"after": [str(followed.path)]}).write(live.run_toml)
    facts = {"pid": process.pid, "start_ticks": start_ticks(process.pid), "host": socket.gethostname()}
    record_job(live, job_id=f"local-{process.pid}", scheduler="local", attempt_base=0, **facts)
    age(live.path, 60 * DAY_S)
    found = plan(capsys)
    assert chosen(found) == {free.path}
    assert why_kept(found) == {followed.run_id: f"{live.run_id} needs it", read.run_id: f"{live.run_id} needs it"}
    process.kill()
    process.wait()
    assert chosen(plan(capsys)) == {followed.path, read.path, free.path, live.path}


def test_what_a_held_run_needs_stays_for_it_may_be_requeued(capsys: pytest.CaptureFixture[str]) -> None:
    needed = new_run()
    for step in (1, 2):
        put(needed, {"count": Count()}, step=step)
    age(needed.path, 60 * DAY_S)
    words = ("--what", "checkpoints", "--what", "runs")
    assert len(chosen(plan(capsys, "--what", "checkpoints"))) == 1
    new_run(state="HELD", after=[str(needed.path)])
    assert chosen(plan(capsys, *words)) == set()


def test_a_run_with_a_pinned_checkpoint_stays(capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    pins.pin(put(run, {"count": Count()}, step=4), run.run_id, "for the paper")
    age(run.path, 60 * DAY_S)
    found = plan(capsys)
    assert chosen(found) == set() and why_kept(found) == {run.run_id: "step-000000004 is pinned"}


def test_a_run_stays_while_its_weights_are_exported(capsys: pytest.CaptureFixture[str], slurm: Path) -> None:
    run = new_run(days=0.1)
    record_job(run, job_id="17", scheduler="slurm", attempt_base=0)
    record(run, "export", job_id="18", scheduler="slurm")
    age(run.path, 0.1 * DAY_S)
    (slurm / "queue").write_text("17|COMPLETED|N/A||None\n18|PENDING|N/A||Priority\n")
    assert chosen(plan(capsys, "--older", "1h")) == set()
    assert len((slurm / "asked").read_text().splitlines()) == 1
    (slurm / "queue").write_text("17|COMPLETED|N/A||None\n")
    assert chosen(plan(capsys, "--older", "1h")) == {run.path}


def test_nothing_is_taken_for_ended_that_the_scheduler_was_not_heard_about(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    silent, ended = new_run(state=None), new_run()
    for run in (silent, ended):
        record_job(run, job_id="17", scheduler="slurm", attempt_base=0)
        age(run.path, 60 * DAY_S)
    monkeypatch.setenv("PATH", str(here))
    out, err = call(capsys, "--plan", "--json", code=3)
    assert "squeue: command not found" in err
    assert chosen(json.loads(out)) == {ended.path}


def test_a_folder_that_may_be_just_being_submitted_stays(capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(Path("runs").absolute(), "demo")
    assert chosen(plan(capsys, "--older", "0s")) == set()
    age(folder.path, 2 * DAY_S)
    assert chosen(plan(capsys, "--older", "0s")) == {folder.path}


@pytest.mark.parametrize("change", ["a file more", "gone", "requeued", "pinned"])
def test_a_plan_is_refused_whole_when_the_world_has_changed(capsys: pytest.CaptureFixture[str], change: str) -> None:
    same, changed = new_run(), new_run()
    put(changed, {"count": Count()}, step=4)
    age(changed.path, 60 * DAY_S)
    plan_id = plan(capsys)["plan"]
    match change:
        case "a file more":
            (changed.logs / "new").touch()
        case "gone":
            shutil.rmtree(changed.path)
        case "requeued":
            changed.reopen()
        case _:
            pins.pin(changed.checkpoints / "step-000000004", changed.run_id, None)
    err = call(capsys, plan_id, code=1)[1]
    assert f"error: {changed.path}: " in err
    assert f"{plan_id}: nothing was removed: 1 of 2 things have changed" in err
    assert same.path.exists()


def test_what_changes_in_the_very_moment_gets_its_name_back() -> None:
    run = new_run()
    item = Item(kind="runs", path=run.path, run_id=run.run_id, tree=measure(run.path), why="")
    run.reopen()
    assert remove(item) == "has just been changed"
    assert run.run_toml.exists() and [path.name for path in run.path.parent.iterdir()] == [run.run_id]


def test_checkpoints_go_but_for_the_last_the_best_and_the_marked(capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    spec = run_spec(run_id=run.run_id, name="demo", checkpoint={"keep_best": "loss:min"})
    spec.write(run.run_toml)
    paths = {step: put(run, {"count": Count()}, step=step) for step in (1, 2, 3, 4, 5)}  # 2 has the least loss
    pins.pin(paths[3], run.run_id, None)
    age(run.path, 60 * DAY_S)
    found = plan(capsys, "--what", "checkpoints")
    assert chosen(found) == {paths[1], paths[4]}
    call(capsys, found["plan"])
    assert {path.name for path in run.checkpoints.iterdir() if path.is_dir()} == {paths[s].name for s in (2, 3, 5)}
    assert chosen(plan(capsys, "--older", "0s", "--what", "checkpoints", "--keep-last", "2")) == set()


def test_logs_of_runs_that_stay_go(capsys: pytest.CaptureFixture[str]) -> None:
    run, young = new_run(), new_run(days=1)
    found = plan(capsys, "--what", "logs")
    assert chosen(found) == {run.logs}
    call(capsys, found["plan"])
    assert list(run.logs.iterdir()) == [] and list(young.logs.iterdir()) and run.run_toml.exists()


def test_a_snapshot_goes_with_the_last_run_that_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path("runs").absolute()
    for name in ("used", "shared", "unused", "written-to"):
        (root / ".snapshots" / name).mkdir(parents=True)
        (root / ".snapshots" / name / ".cfe-snapshot.json").write_text("{}")
    (root / ".snapshots" / "unused" / "link").symlink_to("/")
    (root / ".snapshots" / "written-to" / "model.pt").touch()  # by a program, under a relative name
    for name, days in (("used", 1.0), ("shared", 60.0), ("shared", 1.0)):
        run = new_run(days=60)
        text = run.run_toml.read_text()
        assert "[provenance]\n" in text
        lines = text.replace("[provenance]\n", f'[provenance]\nsnapshot = "{root}/.snapshots/{name}"\n')
        run.run_toml.write_text(lines)
        age(run.path, days * DAY_S)
    age(root / ".snapshots", 60 * DAY_S)
    found = plan(capsys, "--what", "snapshots")
    assert chosen(found) == {root / ".snapshots" / "unused"}
    call(capsys, found["plan"])
    assert sorted(path.name for path in (root / ".snapshots").iterdir()) == ["shared", "used", "written-to"]
    assert chosen(plan(capsys, "--what", "snapshots", "--what", "runs", "--older", "0s")) >= {
        root / ".snapshots" / "shared",
        root / ".snapshots" / "used",
    }


def test_what_was_left_half_deleted_is_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(days=1)
    rest = run.path.parent / f".trash-{run.run_id}-0123abcd"
    rest.mkdir()
    (rest / "rest").touch()
    found = plan(capsys)
    assert chosen(found) == {rest}
    call(capsys, found["plan"])
    assert not rest.exists() and run.path.exists()


def test_a_sweep_is_one_thing_and_lives_while_a_task_does(
    capsys: pytest.CaptureFixture[str], process: subprocess.Popen[bytes]
) -> None:
    sweep = new_run(state=None)
    sweep.sweep_json.write_text("{}")
    record_job(sweep, job_id="local-1", scheduler="local", attempt_base=0, host=socket.gethostname(), pid=1)
    for number, state in ((0, "COMPLETED"), (1, "FAILED")):
        task = sweep.task(number)
        task.control.mkdir(parents=True)
        task.write_result({"state": state})
    age(sweep.path, 60 * DAY_S)
    assert [item["why"] for item in plan(capsys)["items"]] == ["FAILED, 60d ago"]
    facts = {"pid": process.pid, "start_ticks": start_ticks(process.pid), "host": socket.gethostname()}
    record_job(sweep.task(1), job_id=f"local-{process.pid}", scheduler="local", attempt_base=0, **facts)
    sweep.task(1).result_path.unlink()
    age(sweep.path, 60 * DAY_S)
    assert len(all_jobs(sweep)) == 1 and chosen(plan(capsys)) == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "gc: no plan is named; find what may go with `cfe-hpc gc --plan`"),
        (["gc-20260101-000000-abcd", "--plan"], "gc: both --plan and a plan are given"),
        (["gc-20260101-000000-abcd"], "no such plan, or it was carried out; make one with"),
        (["gc-20260101-000000-abcd", "--older", "1d"], "gc: a plan is carried out as it is"),
        (["--plan", "--older", "soon"], "--older: not a duration"),
        (["--plan", "--larger", "big"], "--larger: not a size"),
        (["--plan", "--state", "FAILD"], "--state: runs do not end so (FAILD); did you mean FAILED?"),
        (["--plan", "--keep-last", "-1"], "--keep-last: must be at least 0 (-1)"),
    ],
)
def test_mistakes_get_a_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    err = call(capsys, *words, code=2)[1]
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_file_that_is_no_plan_is_refused(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "plan.json").write_text('{"format": 0}')
    assert "is no plan of this version" in call(capsys, here / "plan.json", code=2)[1]
    (here / "plan.json").write_text("{")
    assert "cannot be read as a plan" in call(capsys, here / "plan.json", code=2)[1]
