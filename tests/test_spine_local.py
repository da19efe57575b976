"""Whole runs on the embedded default: the same stop protocol, with the local supervisor as the scheduler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from spine.harness import LiveRun, cfe, site_file, write_job

from cfe_hpc.files import read_toml

STEPS = 30
TOTAL = sum(range(STEPS))

Submit = Callable[..., LiveRun]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """Submit the counting job, with changes; its supervisor is gone when the test is."""
    runs: list[LiveRun] = []

    def counting(site: str = "local", *, pause_s: float = 0.1, **tables: Any) -> LiveRun:
        job: dict[str, Any] = {
            "name": "count",
            "entry": "entries:counting",
            "resources": {"devices_per_node": 1},
            "params": {"steps": STEPS, "pause_s": pause_s, "variant": "a"},
        }
        job.update(tables)
        run = LiveRun.submit(write_job(tmp_path, **job), site, cwd=tmp_path, env=os.environ)
        runs.append(run)
        return run

    yield counting
    for run in runs:
        supervisor = supervisor_of(run)
        if Path(f"/proc/{supervisor}").exists() and run.folder.result() is None:
            os.kill(supervisor, signal.SIGKILL)


def supervisor_of(run: LiveRun) -> int:
    return int(run.job_id.removeprefix("local-"))


def total(result: dict[str, Any]) -> Any:
    return result["metrics"]["total"]


def test_a_run_counts_every_step_once_whatever_stops_it(submit: Submit) -> None:
    run = submit()
    run.wait_step(4, attempt=0)
    os.kill(supervisor_of(run), signal.SIGTERM)
    run.wait_step(9, attempt=1)
    done = cfe("requeue", run.run_id, cwd=run.cwd, env=run.env)
    assert done.returncode == 0, done.stderr
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"], total(result)) == ("COMPLETED", 3, 0, TOTAL)
    assert [event["reason"] for event in run.events("requeued")] == ["preempted", "requeue_requested"]
    assert [event["step"] for event in run.events("resumed")] == [event["step"] for event in run.events("requeued")]


def test_the_time_limit_is_one_more_reason_to_go_on(submit: Submit, tmp_path: Path) -> None:
    site = site_file(tmp_path, "local", slurm={"signal_lead": 2.0, "kill_wait": 5.0})
    run = submit(site, pause_s=0.25, resources={"devices_per_node": 1, "time": "6s"})
    result = run.wait_result()
    assert (result["state"], result["lost_steps"], total(result)) == ("COMPLETED", 0, TOTAL)
    assert {event["reason"] for event in run.events("requeued")} == {"time_limit"}


def test_the_runs_own_timer_stops_it_where_the_signal_would_come_too_late(submit: Submit, tmp_path: Path) -> None:
    site = site_file(tmp_path, "local", slurm={"signal_lead": 0.2, "kill_wait": 5.0})
    run = submit(site, pause_s=0.2, resources={"devices_per_node": 1, "time": "6s"}, checkpoint={"every_steps": 5})
    result = run.wait_result()
    assert (result["state"], result["lost_steps"], total(result)) == ("COMPLETED", 0, TOTAL)
    assert "timer" in {event["reason"] for event in run.events("signal")}
    assert {event["reason"] for event in run.events("requeued")} == {"time_limit"}


def test_cancel_ends_a_run_for_good(submit: Submit) -> None:
    run = submit(pause_s=0.4)
    run.wait_step(4, attempt=0)
    done = cfe("cancel", run.run_id, "--json", cwd=run.cwd, env=run.env)
    assert done.returncode == 0, done.stderr
    assert run.wait_result()["state"] == "CANCELLED"
    assert run.events("requeued") == []


def test_crashes_are_followed_by_attempts_as_the_budget_allows(submit: Submit) -> None:
    run = submit(recovery={"failures": 2}, checkpoint={"every_steps": 3})
    for attempt in range(2):
        run.wait_step(5 * (attempt + 1), attempt=attempt)
        kill_ranks(run)
    result = run.wait_result()
    assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 3, TOTAL)
    assert 0 < result["lost_steps"] <= 6
    assert all(event["step"] % 3 == 0 for event in run.events("resumed"))


def kill_ranks(run: LiveRun) -> None:
    """SIGKILL to the supervisor's children."""
    supervisor = supervisor_of(run)
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGKILL)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def stop_for_surgery(run: LiveRun, step: int) -> None:
    """End a run at a step, so that its checkpoints can be damaged before `requeue`."""
    run.wait_step(step, attempt=0)
    kill_ranks(run)
    assert run.wait(run.folder.result, 60, "ended")["state"] == "FAILED"


def test_damage_to_the_newest_checkpoint_costs_its_steps_and_is_told(submit: Submit) -> None:
    run = submit(checkpoint={"every_steps": 4})
    stop_for_surgery(run, 9)
    newest = sorted(run.folder.checkpoints.glob("step-*"))[-1]
    flip(next(newest.glob("shard-*.json")), 40)
    done = cfe("requeue", run.run_id, "--json", cwd=run.cwd, env=run.env)
    assert done.returncode == 0, done.stderr
    result = run.wait(lambda: ended(run, "COMPLETED"), 60, "completed")
    assert total(result) == TOTAL
    (skipped,) = run.events("checkpoint_failed")
    assert newest.name in skipped["detail"]
    assert run.events("resumed")[0]["step"] < int(newest.name.removeprefix("step-"))


def ended(run: LiveRun, state: str) -> dict[str, Any] | None:
    result = run.folder.result()
    return result if result is not None and result["state"] == state else None


def test_a_run_without_any_good_checkpoint_is_held_not_started_over(submit: Submit) -> None:
    run = submit(checkpoint={"every_steps": 4})
    stop_for_surgery(run, 9)
    for manifest in run.folder.checkpoints.glob("*/manifest.json"):
        manifest.write_bytes(b"")
    kept = sorted(path.name for path in run.folder.checkpoints.iterdir())
    done = cfe("requeue", run.run_id, cwd=run.cwd, env=run.env)
    assert done.returncode == 0, done.stderr
    result = run.wait(lambda: ended(run, "HELD"), 60, "held")
    assert "none of 2 checkpoints" in result["reason"] and "manifest.json is empty" in result["reason"]
    assert "cfe-hpc requeue" in result["reason"]
    assert sorted(path.name for path in run.folder.checkpoints.iterdir()) == kept
    status = cfe("status", run.run_id, "--json", cwd=run.cwd, env=run.env)
    assert json.loads(status.stdout)[0]["state"] == "HELD"


def test_another_variant_is_refused_before_training(submit: Submit) -> None:
    run = submit(checkpoint={"every_steps": 4})
    stop_for_surgery(run, 5)
    spec = read_toml(run.folder.run_toml)
    spec["job"]["params"]["variant"] = "b"
    run.folder.run_toml.write_text(tomli_w.dumps(spec))
    beats = run.step()
    done = cfe("requeue", run.run_id, cwd=run.cwd, env=run.env)
    assert done.returncode == 0, done.stderr
    result = run.wait(lambda: ended(run, "FAILED") if run.attempt() == 1 else None, 60, "refused")
    assert "variant is 'a' in the checkpoint and 'b' in the job" in result["reason"] + run.log()
    assert "Traceback" not in run.log()
    assert run.step() == beats


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_full_disk_costs_checkpoints_not_the_run(submit: Submit, tmp_path: Path) -> None:
    small = tmp_path / "small disk"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=True, timeout=20)
    try:
        site = site_file(tmp_path, "local", storage={"runs_root": str(small)})
        run = submit(site, checkpoint={"every_steps": 3, "keep_last": 1})
        run.wait(lambda: run.events("checkpoint_saved"), 60, "saved once")
        # What is left is too small for a checkpoint, and enough for journals.
        free = os.statvfs(small)
        (small / "ballast").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - 200_000))
        failed = run.wait(lambda: run.events("checkpoint_failed"), 60, "told of the full disk")[0]
        assert "No space left on device" in failed["detail"]
        (small / "ballast").unlink()
        result = run.wait_result()
        assert (result["state"], total(result)) == ("COMPLETED", TOTAL)
        done = cfe("checkpoints", "verify", str(run.folder.path), cwd=run.cwd, env=run.env)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True, timeout=20)


def test_a_command_that_knows_nothing_of_cfe_hpc_is_requeued_when_stopped(submit: Submit, tmp_path: Path) -> None:
    program = tmp_path / "my program.sh"
    program.write_text(
        'trap \'echo saved > "$1"; kill $!; exit 3\' TERM\n[ -e "$1" ] && { echo "$2"; exit 0; }\nsleep 60 & wait $!\n'
    )
    mark = tmp_path / "it's saved"
    run = submit(
        entry=None,
        command=["sh", str(program), str(mark), "{params.word}"],
        params={"word": "a; $(touch injected) 'b'"},
    )
    run.wait(lambda: run.events("started"), 60, "started")
    time.sleep(1.0)  # until the shell has set its trap
    os.kill(supervisor_of(run), signal.SIGTERM)
    result = run.wait_result()
    assert (result["state"], result["attempts"]) == ("COMPLETED", 2)
    assert mark.read_text() == "saved\n"
    assert "a; $(touch injected) 'b'" in run.log("out")
    assert not (tmp_path / "injected").exists()


def test_a_failing_command_fails_the_run(submit: Submit) -> None:
    run = submit(entry=None, command=["sh", "-c", "exit 7"])
    result = run.wait(run.folder.result, 60, "ended")
    assert result["state"] == "FAILED"
    assert any("7" in str(event.get("reason")) for event in run.events("failed"))


def test_metrics_are_on_the_gateway_while_it_trains_and_gone_after(submit: Submit, pushgateway: Any) -> None:
    run = submit(metrics={"pushgateway": pushgateway.url})
    shown = run.wait(lambda: with_run(pushgateway, run), 60, "on the gateway")
    assert "cfe_hpc_step" in shown
    os.kill(supervisor_of(run), signal.SIGTERM)
    assert run.wait_result()["state"] == "COMPLETED"
    run.wait(lambda: run.run_id not in pushgateway.metrics(), 20, "gone")  # the gateway answers 202, "accepted"


def with_run(pushgateway: Any, run: LiveRun) -> str | None:
    shown: str = pushgateway.metrics()
    return shown if run.run_id in shown else None


def test_submit_waits_and_says_how_it_ended(tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        name="waited",
        entry="entries:counting",
        resources={"devices_per_node": 1},
        params={"steps": 3, "pause_s": 0.0, "variant": "a"},
    )
    done = cfe("submit", str(job), "--site", "local", "--wait", cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "COMPLETED" in done.stdout + done.stderr


def test_a_run_begins_with_the_checkpoint_of_another(submit: Submit) -> None:
    first = submit(params={"steps": 10, "pause_s": 0.0, "variant": "a"})
    assert first.wait_result()["state"] == "COMPLETED"
    saved = first.folder.checkpoints / "step-000000010"
    run = submit(checkpoint={"resume_from": first.run_id})
    run.wait_step(12, attempt=0)
    os.kill(supervisor_of(run), signal.SIGTERM)  # from its own checkpoint then
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"], total(result)) == ("COMPLETED", 2, 0, TOTAL)
    begun, resumed = run.events("resumed")
    assert (begun["step"], begun["detail"]) == (10, f"from {saved}")
    assert resumed["step"] > 10 and "detail" not in resumed
    assert saved.is_dir() and not (run.folder.checkpoints / saved.name).exists()


def test_a_run_that_has_nothing_to_begin_with_says_so(submit: Submit, tmp_path: Path) -> None:
    words = ("check", "job.toml", "--site", "local", "--set", "checkpoint.resume_from=gone")
    write_job(tmp_path, name="count", entry="entries:counting", checkpoint={"every_steps": 5})
    done = cfe(*words, cwd=tmp_path, env=os.environ)
    assert done.returncode == 1
    said = f"--set: checkpoint.resume_from: there is no run in {tmp_path / 'gone'} (gone)"
    assert f"error: {said}; name the folder or the id of a run that has saved, or take it out" in done.stdout
    run = submit(checkpoint={"resume_from": "gone"}, checks={"ignore": ["resume-missing"]})
    result = run.wait_result()
    assert result["state"] == "FAILED"
    assert "has no checkpoint; name another run, or take it out" in result["reason"]
