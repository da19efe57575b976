"""Whole runs whose checkpoints go to the nodes first, with nodes that are folders: lost, stopped, and taken onward."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster
from spine.harness import LiveRun, site_file
from spine.stage import STEPS as SLURM_STEPS
from spine.stage import Stage
from test_checkpoint_async import children
from test_spine_local import TOTAL, Submit, submit, supervisor_of, total

from cfe_hpc.checkpoints.tiers.places import tiers_of

__all__ = ["submit"]

full = pytest.mark.skipif(not os.environ.get("CFE_TEST_FULL"), reason="its parts have tests; CFE_TEST_FULL=1 runs it")

TIERS = {"every_steps": 5, "async": True, "local": True, "partner": True}

Start = Callable[..., LiveRun]


@pytest.fixture
def start(submit: Submit, tmp_path: Path) -> Start:
    """Submit the counting job on two nodes, with changes to its checkpoints and its site's [slurm]."""

    def on_nodes(checkpoint: dict[str, Any], *, slurm: dict[str, Any] | None = None, **tables: Any) -> LiveRun:
        storage = {"node_local": f"{tmp_path}/node-$CFE_NODE_RANK"}
        site = site_file(tmp_path, "local", storage=storage, slurm=slurm or {})
        resources = {"nodes": 2, "devices_per_node": 1}
        return submit(site, resources=resources, checkpoint={**TIERS, **checkpoint}, **tables)

    return on_nodes


def helpers(run: LiveRun, module: str) -> list[int]:
    """Process ids of the helpers of all ranks that run a module."""
    pids = [pid for rank in children(supervisor_of(run)) for pid in children(rank)]
    name = f"cfe_hpc.checkpoints.tiers.{module}".encode()
    return [pid for pid in pids if name in Path(f"/proc/{pid}/cmdline").read_bytes()]


def on_nodes(run: LiveRun) -> list[int]:
    """Steps that were complete on the nodes, as they came."""
    record = run.folder.checkpoints / "tiers.ndjson"
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return [line["step"] for line in lines if line["tier"] == "local" and "gone" not in line]


def with_stopped_drainers(run: LiveRun) -> list[int]:
    """Have everything stay on the nodes from the first checkpoint on."""
    drainers = run.wait(lambda: found if len(found := helpers(run, "drainer")) == 2 else None, 30, "draining")
    run.wait_step(2, attempt=0)  # they have met by now
    for pid in drainers:
        os.kill(pid, signal.SIGSTOP)
    return drainers


def test_a_lost_node_costs_no_step_of_what_was_complete_on_the_nodes(start: Start, tmp_path: Path) -> None:
    run = start({}, recovery={"failures": 1})
    with_stopped_drainers(run)
    run.wait(lambda: on_nodes(run) == [5], 30, "complete on the nodes")
    assert run.events("checkpoint_saved") == []
    shutil.rmtree(tmp_path / "node-1")
    for pid in children(supervisor_of(run)):
        os.kill(pid, signal.SIGKILL)
    result = run.wait_result()
    assert (result["state"], result["attempts"], total(result)) == ("COMPLETED", 2, TOTAL)
    assert [event["step"] for event in run.events("resumed")] == [5]
    assert run.events("checkpoint_failed") == []
    saved = [event["step"] for event in run.events("checkpoint_saved")]
    assert saved == [5, 10, 15, 20, 25, 30]
    shared = {step: ["shared"] for step in (5, 20, 25)}  # 5 was resumed from
    assert tiers_of(run.folder.checkpoints) == {**shared, 30: ["local", "shared"]}


def test_a_stop_with_too_little_time_for_the_shared_filesystem_ends_on_the_nodes(start: Start) -> None:
    run = start({"every_steps": 100}, slurm={"kill_wait": 5.0})
    with_stopped_drainers(run)
    run.wait_step(4, attempt=0)
    os.kill(supervisor_of(run), signal.SIGTERM)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"], total(result)) == ("COMPLETED", 2, 0, TOTAL)
    (stop,) = run.events("requeued")
    assert [event["step"] for event in run.events("resumed")] == [stop["step"]]
    assert "time is up: step" in run.events("degraded")[0]["detail"]
    # Not before: the next attempt has brought it.
    assert [event["attempt"] for event in run.events("checkpoint_saved")] == [1, 1]


def test_a_stop_overtakes_what_is_on_its_way_and_nothing_is_degraded(start: Start) -> None:
    run = start({})
    with_stopped_drainers(run)
    run.wait(lambda: on_nodes(run) == [5], 30, "complete on the nodes")
    os.kill(supervisor_of(run), signal.SIGTERM)
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"], total(result)) == ("COMPLETED", 2, 0, TOTAL)
    first = run.events("checkpoint_saved")[0]
    assert (first["attempt"], first["step"]) == (0, run.events("requeued")[0]["step"])
    assert run.events("degraded") == []


@full
def test_what_is_near_is_read_and_what_is_bad_there_is_not(start: Start, tmp_path: Path) -> None:
    run = start({"local_keep_last": 2}, recovery={"failures": 1})
    run.wait(lambda: len(run.events("checkpoint_saved")) == 2, 30, "saved twice")
    newest = run.events("checkpoint_saved")[-1]["step"]
    for pid in children(supervisor_of(run)):
        os.kill(pid, signal.SIGSTOP)
    shard = next((tmp_path / "node-0").glob(f"cfe_hpc-*/*/step-{newest:09d}.*/shard-00000.bin"))
    content = bytearray(shard.read_bytes())
    content[:4096] = bytes(4096)
    shard.write_bytes(content)
    for pid in children(supervisor_of(run)):
        os.kill(pid, signal.SIGKILL)
    result = run.wait_result()
    assert (result["state"], total(result)) == ("COMPLETED", TOTAL)
    assert [event["step"] for event in run.events("resumed")] == [newest]
    (degraded,) = run.events("degraded")
    assert degraded["reason"] == "checkpoint_copy" and "shard-00000.bin" in degraded["detail"]


@full
def test_without_node_local_folder_checkpoints_go_straight_to_the_shared_filesystem(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "node-1").write_text("no folder")
    run = start({})
    result = run.wait_result()
    assert (result["state"], total(result)) == ("COMPLETED", TOTAL)
    (degraded,) = run.events("degraded")
    assert degraded["reason"] == "checkpoint_local" and "rank 1" in degraded["detail"]
    assert on_nodes(run) == []


def test_checkpoints_go_onward_and_come_back_when_nothing_else_is_left(submit: Submit, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/remote"
    remote = {"remote": url, "remote_keep_last": 2, "remote_every_steps": 10}
    run = submit(checkpoint={"every_steps": 5, **remote}, recovery={"failures": 1}, pause_s=0.2)
    there = tmp_path / "remote" / run.run_id / "step-000000010" / "manifest.json"
    run.wait(there.exists, 60, "at the remote")
    (rank,) = children(supervisor_of(run))
    os.kill(rank, signal.SIGSTOP)
    shutil.rmtree(run.folder.checkpoints)
    os.kill(rank, signal.SIGKILL)
    result = run.wait_result()
    assert (result["state"], total(result)) == ("COMPLETED", TOTAL)
    assert [event["step"] for event in run.events("resumed")] == [10]
    run.wait(lambda: tiers_of(run.folder.checkpoints)[30] == ["shared", "remote"], 30, "noted")
    left = sorted(path.name for path in there.parents[1].iterdir())  # of those that came meanwhile, the newest
    assert len(left) == 2 and left[-1] == "step-000000030"


def test_a_remote_that_cannot_be_reached_costs_nothing(submit: Submit, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    (tmp_path / "remote").write_text("no folder")
    url = f"file://{tmp_path}/remote/x"
    run = submit(checkpoint={"every_steps": 100, "remote": url}, pause_s=0.0)
    result = run.wait_result()
    assert (result["state"], total(result)) == ("COMPLETED", TOTAL)
    degraded = run.wait(lambda: run.events("degraded"), 60, "told")
    assert degraded[0]["reason"] == "checkpoint_remote" and "step 30: " in degraded[0]["detail"]


@full
def test_ends_of_epochs_are_saved_at_their_very_step(start: Start) -> None:
    checkpoint = {"every_steps": 1, "keep_last": 1, "keep_epochs": True}
    run = start(checkpoint, entry="entries:epochs", params={"steps": 9, "epoch_steps": 4})
    assert run.wait_result()["state"] == "COMPLETED"
    assert {4, 8, 9} <= set(tiers_of(run.folder.checkpoints))
    assert run.events("checkpoint_failed") == []


@pytest.mark.slurm
@pytest.mark.slow
def test_slurm_preempts_and_nodes_keep_what_is_theirs(cluster: Cluster, tmp_path: Path) -> None:
    stage = Stage(cluster, tmp_path)
    site = site_file(tmp_path, storage={"node_local": f"{tmp_path}/$SLURMD_NODENAME"})
    run = stage.submit("spot", nodes=2, site=site, checkpoint={**TIERS, "every_steps": 3})
    for attempt in range(2):
        run.wait_step(run.step() + 4, attempt=attempt)
        cluster.preempt_once(run.job_id)
        run.wait(lambda attempt=attempt: run.attempt() > attempt, 120, "on its next attempt")
    result = run.wait_result()
    assert (result["state"], result["attempts"], result["lost_steps"]) == ("COMPLETED", 3, 0)
    assert result["metrics"]["total"] == sum(range(SLURM_STEPS))
    assert run.events("checkpoint_failed") == [] and run.events("degraded") == []
    homes = [path for path in tmp_path.glob("*/cfe_hpc-*") if path.is_dir()]
    assert len(homes) >= 2 and on_nodes(run)
