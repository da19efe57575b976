"""A sweep on Slurm, with programs that stand for Slurm's: what is sent, what its tasks make, how it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from slurm_programs import calls, slurm

from cfe_hpc.cli.main import main
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import UsageError
from cfe_hpc.launch import sweep as launch_sweep
from cfe_hpc.ranks.jobrecords import records
from cfe_hpc.ranks.sweep_task import begin
from cfe_hpc.recovery.result import write_result
from cfe_hpc.reports.find import find_run
from cfe_hpc.runfolder import RunFolder

__all__ = ["slurm"]  # a fixture

Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _submit(capsys: Capture, tasks: int, *words: str, status: int = 0, **tables: Any) -> dict[str, Any]:
    """What `submit --json` prints for a sweep of so many tasks, at a site with 1,001 indices."""
    job = {"name": "job", "command": ["true", "{params.x}"], "checkpoint": {"every_steps": 5}, **tables}
    Path("job.toml").write_text(tomli_w.dumps(job))
    axis = f"params.x={{range=[0, {tasks}]}}"
    assert main(["submit", "job.toml", "--site", "minislurm", "--sweep", axis, "--json", *words]) == status
    printed = capsys.readouterr().out
    return dict(json.loads(printed)) if printed else {}


def _sweep(capsys: Capture, tasks: int, *words: str, **tables: Any) -> RunFolder:
    return RunFolder(Path(_submit(capsys, tasks, *words, **tables)["run_dir"]))


def _rows(capsys: Capture, sweep: RunFolder, *words: str) -> list[dict[str, Any]]:
    assert main(["status", str(sweep.path), "--json", *words]) == 0
    return list(json.loads(capsys.readouterr().out))


def _queue(slurm: Path, *rows: str) -> None:
    """What squeue prints, as id|state|reason."""
    lines = (f"{job}|{state}|N/A||{reason}" for job, state, reason in (row.split("|") for row in rows))
    (slurm / "queue").write_text("".join(f"{line}\n" for line in lines))


def _end(task: RunFolder, state: Any, cause: str | None = None, **metrics: float) -> None:
    """What an attempt of a task leaves that has ended so."""
    task.append_event("started", attempt=0, detail={"job_id": "41_0"})
    if cause is not None:
        task.append_event("failed", attempt=0, cause=cause, reason=f"it was {cause}")
    write_result(task, state, attempts=1, reason=None if state == "COMPLETED" else "so", metrics=metrics)


def test_a_sweep_is_a_folder_of_a_few_files_and_as_few_arrays_as_can_be(capsys: Capture, slurm: Path) -> None:
    told = _submit(capsys, 1500, "--max-parallel", "30")
    sweep = RunFolder(Path(told["run_dir"]))
    assert told["tasks"] == 1500 and told["job_ids"] == ["41", "42"]
    assert list(told)[:4] == ["sweep_id", "run_dir", "job_id", "tasks"]
    sent = [call for call in calls(slurm) if call.startswith("sbatch")]
    assert [call.split()[-2] for call in sent] == ["--array=0-1000%20", "--array=0-498%10"]
    assert len([path for path in sweep.path.rglob("*") if path.is_file()]) <= 20
    kept = [(job["job_id"], job["offset"], job["tasks"]) for job in records(sweep, "job")]
    assert kept == [("41", 0, "0-1000"), ("42", 1001, "1001-1499")]
    assert (sweep.is_sweep, sweep.tasks()) == (True, [])
    assert RunSpec.read(sweep.run_toml).job.params == {}


def test_arrays_wait_for_one_another_where_fewer_may_run_than_there_are(capsys: Capture, slurm: Path) -> None:
    _submit(capsys, 1500, "--max-parallel", "1")
    first, second = (call for call in calls(slurm) if call.startswith("sbatch"))
    assert "--dependency" not in first and "--dependency=afterany:41 --array=0-498%1" in second


def test_a_refusal_of_the_second_array_takes_the_first_back(capsys: Capture, slurm: Path, tmp_path: Path) -> None:
    (slurm / "refused").write_text("42\n")
    _submit(capsys, 1500, status=3)
    assert calls(slurm)[-1] == "scancel 41"
    assert not list(tmp_path.glob("runs/*"))


def test_a_dry_run_of_a_sweep_shows_the_arrays_and_writes_nothing(capsys: Capture, slurm: Path, tmp_path: Path) -> None:
    told = _submit(capsys, 1500, "--dry-run")
    assert (told["tasks"], told["arrays"]) == (1500, ["--array=0-1000", "--array=0-498"])
    assert "-m cfe_hpc.ranks.sweep_task" in told["script"]
    assert not (tmp_path / "runs").exists() and not calls(slurm)
    main(["submit", "job.toml", "--site", "minislurm", "--sweep", "params.x=7,8", "--dry-run"])
    printed = capsys.readouterr().out
    assert "sweep       2 tasks, grid: params.x (2)" in printed
    assert "array       tasks 0 to 1: sbatch --array=0-1" in printed


def test_a_task_makes_a_whole_run_folder_on_its_node(capsys: Capture) -> None:
    sweep = _sweep(capsys, 1500)
    assert begin(sweep, 1203, "42_202") == 0
    task = sweep.task(1203)
    spec = RunSpec.read(task.run_toml)
    assert (spec.run_id, spec.job.params, spec.job.sweep) == (f"{sweep.run_id}.001203", {"x": 1203}, None)
    assert spec.origins["job.params.x"] == "sweep, task 1203"
    assert task.starter.read_text() == sweep.starter.read_text()
    assert task.submission_script.read_text() == sweep.submission_script.read_text()
    (submitted,) = task.events()
    assert (submitted["event"], submitted["run_id"]) == ("submitted", task.run_id)
    before = task.run_toml.read_bytes()
    assert begin(sweep, 1203, "42_202") == 0  # requeued
    assert (task.run_toml.read_bytes(), len(records(task, "job"))) == (before, 1)
    task.append_event("started", attempt=1)
    assert begin(sweep, 1203, "50_202") == 2  # sent again
    assert begin(sweep, 1203, "51", attempt_base=3) == 3  # a successor, which its sender records
    assert [job["job_id"] for job in records(task, "job")] == ["42_202", "50_202"]


def test_no_task_of_a_cancelled_sweep_begins(capsys: Capture) -> None:
    sweep = _sweep(capsys, 3)
    sweep.promise("cancel")
    with pytest.raises(UsageError, match="was cancelled: no attempt begins"):
        begin(sweep, 1, "41_1")
    assert sweep.tasks() == []


def test_tasks_that_have_not_started_are_what_slurm_says_of_them(capsys: Capture, slurm: Path) -> None:
    sweep = _sweep(capsys, 6)
    begin(sweep, 0, "41_0")
    waits = "41_[4-5%2]|PENDING|JobArrayTaskLimit"
    _queue(slurm, waits, "41_0|RUNNING|None", "41_1|CANCELLED|None", "41_2|TIMEOUT|TimeLimit")
    rows = _rows(capsys, sweep)
    assert [row["state"] for row in rows] == ["RUNNING", "CANCELLED", "FAILED", "FAILED", "PENDING", "PENDING"]
    assert "no longer knows 41_3" in rows[3]["reason"] and rows[5]["reason"] == "JobArrayTaskLimit"
    assert rows[4] | {"values": {"params.x": 4}, "task": 4, "job_id": "41_4", "attempt": None} == rows[4]
    assert main(["status", "--site", "minislurm"]) == 0
    listed = capsys.readouterr().out.splitlines()[1]
    assert "tasks: 1 RUNNING, 2 PENDING, 2 FAILED, 1 CANCELLED" in listed and listed.split()[1] == "RUNNING"


def test_the_table_shows_counts_values_and_the_best(capsys: Capture) -> None:
    sweep = _sweep(capsys, 3, "--set", "checkpoint.keep_best=acc:max")
    for number, value in enumerate((0.5, 0.75)):
        begin(sweep, number, f"41_{number}")
        _end(sweep.task(number), "COMPLETED", acc=value, loss=value)
    sweep.promise("cancel")
    assert main(["status", str(sweep.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{sweep.run_id}: 3 tasks: 1 CANCELLED, 2 COMPLETED"
    assert lines[2].split() == ["TASK", "STATE", "JOB", "ATTEMPT", "STEP", "acc", "params.x", "REASON"]
    assert lines[-1] == "best acc: 0.75, task 1: params.x = 1"
    assert [row["best"] for row in _rows(capsys, sweep, "--best", "loss:min")] == [True, False, False]
    assert main(["status", str(sweep.path), "--best", "loss"]) == 2
    assert "--best: not a metric and its better end (loss)" in capsys.readouterr().err


def _ended(capsys: Capture, *ends: tuple[str, str | None]) -> RunFolder:
    sweep = _sweep(capsys, len(ends))
    for number, (state, cause) in enumerate(ends):
        begin(sweep, number, f"41_{number}")
        _end(sweep.task(number), state, cause)
    return sweep


ENDS: list[tuple[str, str | None]] = [
    ("COMPLETED", None),
    ("FAILED", "failed"),
    ("HELD", "time_limit"),
    ("HELD", "node_failure"),
    ("CANCELLED", None),
]


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ([], [1, 2, 3]),
        (["--failed"], [1, 2, 3]),
        (["--timed-out"], [2]),
        (["--node-failed"], [3]),
        (["--timed-out", "--node-failed"], [2, 3]),
        (["--cancelled"], [4]),
        (["--failed", "--cancelled"], [1, 2, 3, 4]),
    ],
)
def test_retry_takes_the_tasks_that_its_options_mean(capsys: Capture, options: list[str], tasks: list[int]) -> None:
    sweep = _ended(capsys, *ENDS)
    assert main(["retry", str(sweep.path), *options, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == tasks
    assert len(records(sweep, "job")) == 1


def test_retry_sends_tasks_under_their_numbers_and_nothing_else(capsys: Capture, slurm: Path) -> None:
    sweep = _ended(capsys, *ENDS)
    assert (sweep.result() or {})["tasks"] == {"HELD": 2, "FAILED": 1, "CANCELLED": 1, "COMPLETED": 1}
    assert main(["retry", str(sweep.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job_ids"] == ["42"]
    assert calls(slurm)[-1].split()[-2] == "--array=1-3"
    assert sweep.result() is None
    assert [sweep.task(number).result() is None for number in range(5)] == [False, True, True, True, False]
    assert [job["job_id"] for job in records(sweep.task(2), "job")] == ["41_2", "42_2"]
    assert records(sweep.task(2), "job")[1]["attempt_base"] == 1
    _queue(slurm, "42_[1-3]|PENDING|Resources")
    assert [row["state"] for row in _rows(capsys, sweep)] == ["COMPLETED", *["PENDING"] * 3, "CANCELLED"]
    assert main(["retry", str(sweep.path)]) == 0
    assert "no task to send again" in capsys.readouterr().out


def test_a_retry_that_slurm_refuses_leaves_everything_as_it_was(capsys: Capture, slurm: Path) -> None:
    sweep = _ended(capsys, *ENDS)
    before = [sweep.task(number).result() for number in range(5)]
    (slurm / "refused").write_text("42\n")
    assert main(["retry", str(sweep.path), "--cancelled", "--failed"]) == 3
    assert [sweep.task(number).result() for number in range(5)] == before
    assert len(records(sweep, "job")) == 1


def test_retry_waits_for_batch_scripts_that_are_ending(
    capsys: Capture, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = _ended(capsys, ("FAILED", "failed"))
    _queue(slurm, "41_0|COMPLETING|None")
    monkeypatch.setattr(launch_sweep, "_ENDING_S", 0.0)
    assert main(["retry", str(sweep.path)]) == 3
    assert "job 41_0: is still ending; try again in a moment" in capsys.readouterr().err
    assert sweep.task(0).result() is not None and len(records(sweep, "job")) == 1


def test_a_site_that_does_not_say_is_asked_how_many_indices_there_are(capsys: Capture, slurm: Path) -> None:
    (slurm / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize            = 5'\n")
    Path("site.toml").write_text(
        Path(ROOT / "site_configs" / "minislurm.toml").read_text().replace("array_max = 1001\n", "")
    )
    told = _submit(capsys, 12, "--dry-run", "--site", "site.toml")
    assert told["arrays"] == ["--array=0-4", "--array=0-4", "--array=0-1"]


def test_a_run_is_no_sweep_to_retry(capsys: Capture, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs", "job")
    run.run_toml.touch()
    assert main(["retry", str(run.path)]) == 2
    assert "is no sweep; send a run or a task again with `cfe-hpc requeue`" in capsys.readouterr().err


def test_the_last_task_to_end_writes_how_the_sweep_ended(capsys: Capture) -> None:
    sweep = _sweep(capsys, 3)
    for number in (2, 0, 1):
        assert sweep.result() is None
        begin(sweep, number, f"41_{number}")
        _end(sweep.task(number), "COMPLETED")
    assert (sweep.result() or {})["state"] == "COMPLETED"
    sweep.task(1).reopen()
    assert sweep.result() is None


def test_cancel_reaches_arrays_and_those_that_started(capsys: Capture, slurm: Path) -> None:
    sweep = _sweep(capsys, 4)
    for number in (0, 1):
        begin(sweep, number, f"41_{number}")
    _end(sweep.task(0), "COMPLETED")
    _queue(slurm, "41_[2-3]|PENDING|Resources", "41_1|RUNNING|None", "41_0|COMPLETED|None")
    assert main(["cancel", str(sweep.path), "--json"]) == 0
    assert calls(slurm)[-1] == "scancel 41"
    assert sweep.task(1).promised("cancel") and not sweep.task(0).promised("cancel")
    assert (sweep.task(1).result() or {})["state"] == "CANCELLED"  # it was starting: no rank is there to say so
    assert (sweep.result() or {})["tasks"] == {"CANCELLED": 3, "COMPLETED": 1}


def test_tasks_of_a_cancelled_sweep_that_are_not_sent_again_stay_cancelled(capsys: Capture, slurm: Path) -> None:
    sweep = _sweep(capsys, 4)
    begin(sweep, 0, "41_0")
    _end(sweep.task(0), "FAILED", "failed")
    assert main(["cancel", str(sweep.path)]) == 0
    assert (sweep.result() or {})["tasks"] == {"FAILED": 1, "CANCELLED": 3}
    assert main(["retry", str(sweep.path), "--failed"]) == 0
    assert begin(sweep, 0, "42_0") == 1
    with pytest.raises(UsageError, match="was cancelled"):
        begin(sweep, 1, "41_1")
    _end(sweep.task(0), "COMPLETED")
    assert (sweep.result() or {})["tasks"] == {"CANCELLED": 3, "COMPLETED": 1}
    capsys.readouterr()
    assert [row["state"] for row in _rows(capsys, sweep)] == ["COMPLETED", *["CANCELLED"] * 3]
    (slurm / "refused").write_text("43\n")
    assert main(["retry", str(sweep.path), "--cancelled"]) == 3
    assert (sweep.result() or {})["tasks"] == {"CANCELLED": 3, "COMPLETED": 1}
    (slurm / "refused").write_text("none\n")
    assert main(["retry", str(sweep.path), "--cancelled"]) == 0
    assert (begin(sweep, 2, "43_2"), sweep.result()) == (0, None)
    assert main(["cancel", str(sweep.path)]) == 0
    with pytest.raises(UsageError, match="was cancelled"):
        begin(sweep, 3, "43_3")
    assert (sweep.result() or {})["tasks"] == {"CANCELLED": 3, "COMPLETED": 1}


def test_a_sweep_that_was_cancelled_whole_is_not_requeued(capsys: Capture) -> None:
    sweep = _sweep(capsys, 2)
    assert main(["cancel", str(sweep.path)]) == 0
    assert main(["requeue", str(sweep.path)]) == 2
    assert "send its tasks again with `cfe-hpc retry --cancelled`" in capsys.readouterr().err


def test_a_task_is_found_by_the_sweeps_id_and_its_number_and_by_its_job(capsys: Capture, tmp_path: Path) -> None:
    sweep = _sweep(capsys, 1500)
    begin(sweep, 1003, "42_2")
    roots = [tmp_path / "runs"]
    for ref in (f"{sweep.run_id}.001003", f"{sweep.run_id}.1003", f"{sweep.run_id[:18]}.1003", "42_2"):
        assert find_run(ref, roots).path == sweep.task(1003).path, ref
    assert find_run("42", roots).path == find_run(sweep.run_id, roots).path == sweep.path
    with pytest.raises(UsageError, match="has not started, or is no task of it"):
        find_run(f"{sweep.run_id}.7", roots)


def test_a_run_may_follow_a_sweep(capsys: Capture, slurm: Path) -> None:
    sweep = _sweep(capsys, 1500)
    Path("next.toml").write_text(tomli_w.dumps({"name": "next", "command": ["true"]}))
    assert main(["submit", "next.toml", "--site", "minislurm", "--after", sweep.run_id, "--json"]) == 0
    assert "--dependency=afterok:41:42 " in [call for call in calls(slurm) if call.startswith("sbatch")][-1]


def test_verbs_about_one_run_want_a_task_to_be_named(capsys: Capture) -> None:
    sweep = _sweep(capsys, 2)
    begin(sweep, 1, "41_1")
    _end(sweep.task(1), "COMPLETED")
    for verb in (["logs"], ["drill"], ["checkpoints", "ls"]):
        assert main([*verb, str(sweep.path)]) == 2
        assert f"{sweep.run_id}: is a sweep; name one of its tasks" in capsys.readouterr().err
    assert main(["checkpoints", "ls", f"{sweep.run_id}.1", "--site", "minislurm", "--json"]) == 0
    assert main(["report", str(sweep.path)]) == 0
    assert f"{sweep.run_id}.000001" in capsys.readouterr().out


def test_a_batch_that_does_not_divide_in_some_task_is_refused(capsys: Capture) -> None:
    words = ["--site", "minislurm", "--sweep", "params.micro_batch=1,2,3"]
    assert main(["submit", "smoke_2rank", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) >= 1 and "task 2: does not divide among 2 ranks with micro_batch = 3" in told[-1]
