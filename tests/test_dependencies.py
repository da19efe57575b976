"""What waits for a run: what Slurm is told of it, and that it follows the run to a successor and to a new job."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import make_folder, make_spec
from slurm_programs import calls, slurm

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import SchedulerError, UsageError
from cfe_hpc.launch.dependencies import awaited, dependency, dependents, keep_up, note_dependent
from cfe_hpc.launch.follow import follow
from cfe_hpc.ranks import successor
from cfe_hpc.ranks.dependents import move_dependents, moved
from cfe_hpc.reports.status import SchedulerWord, read_status
from cfe_hpc.runfolder import RunFolder

__all__ = ["slurm"]  # a fixture


def new_run(root: Path, *, job_id: str | None = None, state: str | None = None) -> RunFolder:
    folder = make_folder(root / "runs", make_spec(root, scheduler="slurm"))
    if job_id is not None:
        successor.record_job(folder, job_id=job_id, scheduler="slurm", attempt_base=0)
    if state is not None:
        folder.write_result({"state": state})
    return folder


def follower(root: Path, of: RunFolder, *, job_id: str) -> RunFolder:
    spec = make_spec(root, scheduler="slurm", site={"slurm": {"poll_interval": 0.05}})
    folder = make_folder(root / "runs", spec.model_copy(update={"after": [str(of.path)]}))
    successor.record_job(folder, job_id=job_id, scheduler="slurm", attempt_base=0)
    return folder


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("afterok:7(unfulfilled)", "afterok:41"),
        ("afterok:7(unfulfilled),afterany:8(unfulfilled)", "afterok:41,afterany:8"),
        ("afternotok:7(unfulfilled)?afterok:77(unfulfilled)", "afternotok:41?afterok:77"),
        ("afterok:7", "afterok:41"),
        ("afterok:7_3(unfulfilled),afterany:70", "afterok:7_3,afterany:70"),
        ("after:7(unfulfilled),singleton(unfulfilled)", "after:7,singleton"),
    ],
)
def test_a_dependency_names_the_successor_and_is_otherwise_the_same(before: str, after: str) -> None:
    assert moved(before, "7", "41") == after


def test_whatever_waits_for_the_end_of_a_job_is_moved_to_its_successor(slurm: Path) -> None:
    rows = ["50|afterok:7(unfulfilled)", "41|afterany:7(unfulfilled)", "51|afterok:70(unfulfilled)", "52|(null)"]
    (slurm / "queue").write_text("\n".join([*rows, "53|afterany:7(unfulfilled),afterok:8(unfulfilled)"]) + "\n")
    assert move_dependents("7", "41") == ["50", "53"]
    assert calls(slurm) == [
        "scontrol update JobId=50 Dependency=afterok:41",
        "scontrol update JobId=53 Dependency=afterany:41,afterok:8",
    ]


def test_a_job_that_cannot_be_moved_is_named_and_keeps_no_other_back(slurm: Path) -> None:
    (slurm / "queue").write_text("66|afterok:7(unfulfilled)\n67|afterok:7(unfulfilled)\n")
    with pytest.raises(SchedulerError, match=r"job 66 waits for 7, and not for its successor 41.*dependency problem"):
        move_dependents("7", "41")
    assert calls(slurm)[-1] == "scontrol update JobId=67 Dependency=afterok:41"


def test_a_successor_takes_over_what_waits_and_a_job_sent_anew_brings_its_export(tmp_path: Path, slurm: Path) -> None:
    folder = new_run(tmp_path, job_id="7")
    folder.export_script.touch()
    (slurm / "queue").write_text("50|afterok:7(unfulfilled)\n")
    assert successor.submit_successor(folder, job_id="7", next_attempt=1) == "41"
    sent, moved_on = calls(slurm)
    assert "--dependency=afterany:7" in sent and sent.endswith(str(folder.submission_script))
    assert moved_on == "scontrol update JobId=50 Dependency=afterok:41"
    assert successor.submit_successor(folder, job_id="", next_attempt=2) == "42"
    anew, export = calls(slurm)[2:]
    assert "--dependency" not in anew and anew.endswith(str(folder.submission_script))
    assert "--dependency=afterok:42 --kill-on-invalid-dep=yes" in export and export.endswith(str(folder.export_script))


def test_a_successor_stays_though_nobody_could_be_told_of_it(
    tmp_path: Path, slurm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = new_run(tmp_path, job_id="7")
    (slurm / "squeue").write_text("#!/bin/sh\necho down >&2; exit 1\n")
    assert successor.submit_successor(folder, job_id="7", next_attempt=1) == "41"
    assert "what waits for job 7 may never start" in caplog.text


def test_only_what_has_not_completed_is_waited_for(tmp_path: Path) -> None:
    done, first, second = (
        new_run(tmp_path, job_id="7", state="COMPLETED"),
        new_run(tmp_path, job_id="8"),
        new_run(tmp_path, job_id="9"),
    )
    upstream = awaited([done, first, second, first])
    assert [folder.path for folder in upstream] == [first.path, second.path]
    assert dependency(upstream) == ["--dependency=afterok:8:9", "--kill-on-invalid-dep=yes"]
    assert dependency([]) == []
    successor.record(second, "export", job_id="10", scheduler="slurm")
    assert dependency(upstream)[0] == "--dependency=afterok:8:9:10", "what exports its weights, too"


def test_nobody_waits_for_a_run_that_ended_badly_or_was_never_a_job(tmp_path: Path) -> None:
    failed, waiting, local = new_run(tmp_path, state="FAILED"), new_run(tmp_path), new_run(tmp_path)
    with pytest.raises(UsageError, match=f"^--after: {failed.run_id}: ended FAILED; requeue it, or submit without"):
        awaited([failed])
    with pytest.raises(UsageError, match=f"^{waiting.run_id}: waits: {failed.run_id}: ended FAILED; requeue the one"):
        awaited([failed], by=waiting)
    with pytest.raises(UsageError, match="is no Slurm job"):
        dependency([local])


def test_a_successor_that_came_while_a_job_was_sent_is_waited_for(tmp_path: Path, slurm: Path) -> None:
    first, second = new_run(tmp_path, job_id="7"), new_run(tmp_path, job_id="8")
    options = dependency([first, second])
    keep_up([first, second], options)
    assert calls(slurm) == []
    successor.record_job(second, job_id="41", scheduler="slurm", attempt_base=1)
    (slurm / "queue").write_text("50|afterok:7(unfulfilled),afterok:8(unfulfilled)\n")
    keep_up([first, second], options)
    assert calls(slurm) == ["scontrol update JobId=50 Dependency=afterok:7,afterok:41"]


def test_a_run_that_waits_in_vain_says_for_which(tmp_path: Path, slurm: Path) -> None:
    first = new_run(tmp_path, job_id="7")
    second = follower(tmp_path, first, job_id="8")
    third = follower(tmp_path, second, job_id="9")
    waiting = SchedulerWord(state="PENDING", reason="Dependency")
    told = read_status(second, job_id="8", word=waiting)
    assert (told.state, told.reason) == ("PENDING", f"waits for {first.run_id}")
    first.append_event("started", attempt=0)
    first.write_result({"state": "FAILED", "reason": "rank 0 exited with status 3\nand more"})
    vain = f"never started: {first.run_id} ended FAILED: rank 0 exited with status 3"
    for run in (second, third):
        for word in (SchedulerWord(state="CANCELLED"), None):
            told = read_status(run, job_id="8", word=word)
            assert (told.state, told.reason) == ("CANCELLED", vain)
    said: list[str] = []
    assert follow(third, RunSpec.read(third.run_toml), said.append) == "CANCELLED"
    assert said[-1] == vain
    with pytest.raises(UsageError, match=f"^--after: {third.run_id}: {vain}; requeue it"):
        awaited([third])


def test_a_run_remembers_who_follows_it_as_far_as_they_are_there(tmp_path: Path) -> None:
    first, second, gone = new_run(tmp_path), new_run(tmp_path), new_run(tmp_path)
    for follower in (second, gone, second):
        note_dependent([first], follower)
    gone.run_toml.unlink()
    assert [folder.path for folder in dependents(first)] == [second.path]
    assert dependents(second) == []
