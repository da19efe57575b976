"""Whole runs whose disk fills up, fails, slows down, stands still or goes: training goes on, and the last good
checkpoint stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_disks import Disk, ext4
from spine.harness import LiveRun, cfe, site_file, write_job
from test_checkpoint_async import children, gone
from test_spine_local import STEPS, TOTAL, ended, kill_ranks, supervisor_of, total

from cfe_hpc.checkpoints.reader import Opened

FULL = bool(os.environ.get("CFE_TEST_FULL"))
BESIDE = [False, True] if FULL else [True]
MIB = 1 << 20
STATE_BYTES = 6 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An ext4 of 64 MiB, for the runs of a test."""
    with ext4(tmp_path / "disk", 64 * MIB) as disk:
        yield disk


def start(
    tmp_path: Path,
    runs_root: Path,
    *,
    pause_s: float = 0.1,
    params: dict[str, Any] | None = None,
    site: dict[str, Any] | None = None,
    **tables: Any,
) -> LiveRun:
    """A run of `entries:bulky` in `runs_root`."""
    params = {"steps": STEPS, "pause_s": pause_s, "state_bytes": STATE_BYTES, **(params or {})}
    job = write_job(
        tmp_path, name="bulk", entry="entries:bulky", resources={"devices_per_node": 1}, params=params, **tables
    )
    file = site_file(tmp_path, "local", storage={"runs_root": str(runs_root)}, **(site or {}))
    return LiveRun.submit(job, file, cwd=tmp_path, env=os.environ)


def stop(run: LiveRun) -> None:
    """End what a test that failed has left."""
    supervisor = supervisor_of(run)
    if not gone(supervisor):
        for pid in [*children(supervisor), supervisor]:
            os.kill(pid, signal.SIGKILL)


def steps(run: LiveRun, event: str) -> list[int]:
    return [each["step"] for each in run.events(event)]


def verified(run: LiveRun) -> list[int]:
    """The steps of all checkpoints, ascending, each verified."""
    found = []
    for folder in sorted(run.folder.checkpoints.glob("step-*")):
        if ".tmp-" not in folder.name:
            opened = Opened.at(folder, run.run_id)
            opened.verify()
            found.append(opened.step)
    return found


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: "async" if beside else "sync")
def test_a_run_on_a_disk_without_a_free_byte_trains_on(tmp_path: Path, disk: Disk, beside: bool) -> None:
    checkpoint = {"every_steps": 20, "keep_last": 1, "async": beside}
    run = start(tmp_path, disk.path, pause_s=0.01, checkpoint=checkpoint, params={"steps": 400})
    try:
        run.wait(lambda: run.events("checkpoint_saved"), 60, "saved once")
        ballast = disk.fill()
        time.sleep(1.5)  # more lines of the journals than fit the blocks that they have
        assert run.folder.result() is None and not gone(supervisor_of(run)), run.diagnosis()
        assert any(run.folder.checkpoints.glob("step-?????????"))
        ballast.unlink()
        result = run.wait_result()
        assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 1, sum(range(400)))
        assert verified(run)[-1] == 400
    finally:
        stop(run)


def test_a_stop_and_the_end_of_a_run_need_not_a_free_byte(tmp_path: Path, disk: Disk) -> None:
    checkpoint, params = {"every_steps": 5, "keep_last": 1}, {"steps": 60}
    run = start(tmp_path, disk.path, pause_s=0.03, checkpoint=checkpoint, params=params)
    try:
        run.wait(lambda: run.events("checkpoint_saved"), 60, "saved once")
        disk.fill()
        os.kill(supervisor_of(run), signal.SIGTERM)
        result = run.wait_result()
        assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 2, sum(range(60)))
        assert (run.folder.promised("requeued-0") or {})["reason"] == "preempted"
        assert verified(run) == [steps(run, "checkpoint_saved")[-1]]
        run.wait(lambda: gone(supervisor_of(run)), 30, "gone")
        written = "".join(path.read_text() for path in run.folder.logs.iterdir())
        assert "Traceback" not in written
    finally:
        stop(run)


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: "async" if beside else "sync")
def test_what_rotation_may_delete_makes_room_once(tmp_path: Path, disk: Disk, beside: bool) -> None:
    # Room for two checkpoints and a bit, where three should stay.
    (disk.path / "taken").write_bytes(bytes(disk.free_bytes - 2 * STATE_BYTES - 4 * MIB))
    run = start(tmp_path, disk.path, checkpoint={"every_steps": 5, "keep_last": 3, "async": beside})
    try:
        result = run.wait_result()
        assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 1, TOTAL)
        # Beside training, a second try is made at the next boundary.
        due, saved = [5, 10, 15, 20, 25, 30], steps(run, "checkpoint_saved")
        assert all(step - at in (0, int(beside)) for step, at in zip(saved, due, strict=True)), run.diagnosis()
        assert run.events("checkpoint_failed") == []
        assert {event["reason"] for event in run.events("degraded")} == {"checkpoint_disk_full"}
        assert verified(run)[-1] == STEPS
    finally:
        stop(run)


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: "async" if beside else "sync")
def test_a_disk_that_becomes_read_only_costs_checkpoints_and_is_told(tmp_path: Path, disk: Disk, beside: bool) -> None:
    """The run folder stays writable: the checkpoints folder alone lies on the disk that fails."""
    run = start(tmp_path, tmp_path, pause_s=0.05, checkpoint={"every_steps": 3, "async": beside}, params={"steps": 60})
    try:
        run.folder.checkpoints.rmdir()
        (disk.path / "checkpoints").mkdir()
        run.folder.checkpoints.symlink_to(disk.path / "checkpoints")
        run.wait(lambda: len(run.events("checkpoint_saved")) >= 2, 60, "saved twice")
        disk.fail()
        run.wait(lambda: run.events("checkpoint_failed"), 30, "told")
        result = run.wait_result()
        assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 1, sum(range(60)))
        assert verified(run)[-1] >= steps(run, "checkpoint_saved")[-1] > 0
        failed = [event["detail"] for event in run.events("checkpoint_failed")]
        assert len(failed) > 5 and "Read-only file system" in failed[-1]  # each save that was due, and the run went on
    finally:
        stop(run)


def test_a_run_whose_disk_is_gone_trains_on_and_finds_its_checkpoints_when_it_is_back(
    tmp_path: Path, disk: Disk
) -> None:
    run = start(tmp_path, tmp_path, checkpoint={"every_steps": 3, "async": True}, params={"steps": 40})
    back = tmp_path / "back"
    back.mkdir()
    try:
        run.folder.checkpoints.rmdir()
        (disk.path / "run" / "checkpoints").mkdir(parents=True)
        run.folder.checkpoints.symlink_to(disk.path / "run" / "checkpoints")
        run.wait(lambda: len(run.events("checkpoint_saved")) >= 2, 60, "saved twice")
        disk.move(back)
        run.wait(lambda: run.events("checkpoint_failed"), 30, "told")
        before = steps(run, "checkpoint_saved")
        kill_ranks(run)
        run.wait(lambda: ended(run, "FAILED"), 60, "ended")
        Disk(back).move(disk.path)
        assert verified(run)[-1] == before[-1]
        done = cfe("requeue", str(run.folder.path), "--json", cwd=run.cwd, env=run.env)
        assert done.returncode == 0, done.stderr
        result = run.wait(lambda: ended(run, "COMPLETED"), 60, "completed")
        assert total(result) == sum(range(40)) and steps(run, "resumed") == [before[-1]]
    finally:
        stop(run)
        if os.path.ismount(back):
            Disk(back).detach()


@pytest.mark.parametrize("grace_s", [30.0, 1.5] if FULL else [1.5])
def test_a_stop_during_a_save_on_a_slow_disk_keeps_the_newer_if_it_commits_and_the_older_otherwise(
    tmp_path: Path, disk: Disk, grace_s: float
) -> None:
    site = {"slurm": {"kill_wait": grace_s}}
    run = start(tmp_path, disk.path, site=site, checkpoint={"every_steps": 5, "async": True}, params={"steps": 16})
    try:
        run.wait(lambda: steps(run, "checkpoint_saved")[:1] == [5], 60, "saved once")
        with disk.throttled(3 * MIB // 4):  # six MiB take eight seconds, a step far less on the slowest machine
            run.wait_step(11, attempt=0)
            assert 10 not in steps(run, "checkpoint_saved")
            os.kill(supervisor_of(run), signal.SIGTERM)
            run.wait(lambda: run.events("signal"), 30, "stopping")
            if grace_s < 3:
                run.wait(lambda: run.attempt() == 1, 60, "on its next attempt")
                time.sleep(0.5)
            else:
                run.wait(lambda: run.events("requeued"), 60, "requeued")
        result = run.wait_result()
        assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 2, sum(range(16)))
        (resumed,) = steps(run, "resumed")
        if grace_s < 3:
            assert resumed == 5
        else:
            assert [resumed] == steps(run, "requeued") and 10 in steps(run, "checkpoint_saved") and resumed > 10
        assert verified(run)[-1] == 16
    finally:
        stop(run)


@pytest.mark.skipif(not FULL, reason="CFE_TEST_FULL=1 stops a run on a disk that stands still")
def test_a_disk_that_stands_still_holds_a_stop_up_for_the_grace_and_no_longer(tmp_path: Path, disk: Disk) -> None:
    site = {"slurm": {"kill_wait": 2.0}}
    run = start(tmp_path, tmp_path, site=site, checkpoint={"every_steps": 5, "async": True}, pause_s=0.1)
    try:
        run.folder.checkpoints.rmdir()
        (disk.path / "checkpoints").mkdir()
        run.folder.checkpoints.symlink_to(disk.path / "checkpoints")
        run.wait(lambda: steps(run, "checkpoint_saved")[:1] == [5], 60, "saved once")
        with disk.frozen():
            run.wait_step(14, attempt=0)  # its saves stand still, it does not
            assert {event["reason"] for event in run.events("degraded")} <= {"checkpoint_late"}
            (rank,) = children(supervisor_of(run))
            os.kill(supervisor_of(run), signal.SIGTERM)
            run.wait(lambda: gone(rank), 30, "ended")
        result = run.wait_result()
        assert (result["state"], total(result)) == ("COMPLETED", TOTAL)
        assert steps(run, "resumed")[0] in (5, 10) and verified(run)[-1] == STEPS
    finally:
        stop(run)


@pytest.mark.timeout(900)
def test_a_state_larger_than_the_memory_allowed_is_saved_while_training_waits(tmp_path: Path) -> None:
    state_bytes, allowed = (4_000_000_000, "1GB") if FULL else (40_000_000, "10MB")
    checkpoint = {"every_steps": 2, "keep_last": 1, "async": True, "staging_memory": allowed}
    run = start(tmp_path, tmp_path, checkpoint=checkpoint, params={"steps": 5, "state_bytes": state_bytes})
    try:
        result = run.wait_result(timeout_s=600)
        assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 1, sum(range(5)))
        (degraded,) = run.events("degraded")
        assert degraded["reason"] == "checkpoint_staging" and "staging_memory allows" in degraded["detail"]
        assert steps(run, "checkpoint_saved") == [2, 4, 5] and verified(run)[-1] == 5
        opened = Opened.at(run.folder.checkpoints / "step-000000005", run.run_id)
        (name,) = (name for name in opened.reader.names() if opened.reader.describe(name)[1] == (state_bytes,))
        part = memoryview(bytearray(10_000_000))
        for low in range(0, state_bytes, len(part)):
            opened.reader.read_into(name, low, part)
            assert part == bytes([5]) * len(part)
    finally:
        stop(run)
