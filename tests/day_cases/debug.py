"""`debug` on nodes of a cluster, driven in a terminal: pdb, a shell, and a shell beside a rank that runs."""

from __future__ import annotations

import json
import time
from typing import Any

from dialogue import dialogue
from spine.harness import site_file, write_job
from spine.stage import Stage, assert_counted

from cfe_hpc.runfolder import RunFolder

WHOLE_NODE = {"nodes": 1, "devices_per_node": 1, "cpus_per_device": 8, "time": "20m", "partition": "gpu"}
PDB = "(Pdb) "
PROMPT = "$ "


def job(stage: Stage, **tables: Any) -> str:
    """A job of two nodes that counts, and would run for long."""
    resources = {"nodes": 2, "devices_per_node": 1, "cpus_per_device": 1, "time": "12h", "partition": "spot"}
    params = {"steps": 6, "pause_s": 0.0, "variant": "a"}
    tables = {"name": "look", "entry": "entries:counting", "resources": resources, "params": params, **tables}
    return str(write_job(stage.folder, **{key: value for key, value in tables.items() if value is not None}))


def pdb_holds_the_first_of_two_ranks_in_the_debug_partition(stage: Stage) -> None:
    profile = site_file(stage.folder, debug_partition="gpu")
    with dialogue(
        "debug", job(stage), "--site", profile, "--ranks", "2", cwd=stage.folder, env=stage.cluster.env
    ) as shown:
        shown.expect_exact("2 nodes of gpu")
        shown.expect_exact(PDB)
        shown.sendline("run.rank, run.world_size, __import__('os').environ['SLURM_JOB_PARTITION']")
        shown.expect_exact("(0, 2, 'gpu')")
        shown.expect_exact(PDB)
        shown.sendline("n")
        shown.expect_exact(PDB)
        shown.sendline("c")
        assert shown.ended() == 0
    (status,) = json.loads(stage.cfe("status", "--json").stdout)
    assert (status["state"], status["step"]) == ("COMPLETED", 6)


def a_shell_starts_the_job_as_often_as_one_likes(stage: Stage) -> None:
    command = ["bash", "-c", 'echo "rank $RANK of $WORLD_SIZE, greeting $GREETING"']
    path = job(stage, entry=None, command=command, launch={"environment": {"GREETING": "it's me"}})
    with dialogue(
        "debug", path, "--site", site_file(stage.folder), "--shell", cwd=stage.folder, env=stage.cluster.env
    ) as shown:
        for _ in range(2):
            shown.expect_exact(PROMPT)
            shown.sendline("bash -c 'echo \"rank $RANK of $WORLD_SIZE, $GREETING\"'")
            shown.expect_exact("rank 0 of 1, it's me")
        shown.expect_exact(PROMPT)
        shown.sendline("exit")
        assert shown.ended() == 0
    refused = ("debug", path, "--site", site_file(stage.folder), "--set", "resources.constraint=nowhere")
    with dialogue(*refused, cwd=stage.folder, env=stage.cluster.env) as shown:
        shown.expect_exact("Invalid feature specification")
        shown.expect_exact("error: srun: gave no session")
        assert shown.ended() == 3
    (status,) = json.loads(stage.cfe("status", "--json").stdout)
    assert (status["state"], status["reason"]) == ("CANCELLED", "the debug session has ended")


def a_session_that_waits_is_seen_and_cancelled(stage: Stage) -> None:
    later = {"hardware": "h200", "queue": "gpu", "time_limit": "1h", "options": ["--begin=now+600"]}
    site = site_file(stage.folder, debug_partition="later", partitions={"later": later})
    with dialogue("debug", job(stage), "--site", site, cwd=stage.folder, env=stage.cluster.env) as shown:
        shown.expect(r"srun: job (\d+) queued and waiting")
        job_id = shown.match[1]
        deadline = time.monotonic() + 90
        while (status := json.loads(stage.cfe("status", "--json").stdout)[0])["job_id"] != job_id:
            assert time.monotonic() < deadline, status
        assert status["state"] == "PENDING"
        stage.cfe("cancel", job_id)
        assert shown.ended() != 0
    (status,) = json.loads(stage.cfe("status", "--json").stdout)
    assert status["state"] == "CANCELLED"
    with dialogue("debug", job(stage), "--site", site, cwd=stage.folder, env=stage.cluster.env) as shown:
        shown.expect_exact("queued and waiting")
        shown.interrupt()
        shown.expect_exact("error: srun: gave no session")
        assert shown.ended() == 3


def a_shell_beside_a_running_rank_leaves_it_alone(stage: Stage) -> None:
    run = stage.submit("gpu", nodes=2)
    run.wait_step(1, attempt=0)
    with dialogue("debug", "--attach", run.run_id, "--rank", "1", cwd=stage.folder, env=stage.cluster.env) as shown:
        shown.expect_exact(PROMPT)
        shown.sendline('echo "in $SLURM_JOB_ID: $RANK of $WORLD_SIZE, $CFE_RUN_DIR"')
        shown.expect_exact(f"in {run.job_id}: 1 of 2, {run.folder.path}")
        shown.expect_exact(PROMPT)
        shown.sendline("exit")
        assert shown.ended() == 0
    assert_counted(run, attempts=1)
    refused = stage.cfe("debug", "--attach", run.run_id, "--dry-run", status=2)
    assert f"error: {run.run_id}: has ended (COMPLETED)" in refused.stderr


def a_task_of_a_sweep_is_reached_by_its_number(stage: Stage) -> None:
    path = job(stage, resources=WHOLE_NODE, params={"steps": 400, "pause_s": 0.2, "variant": "a"})
    words = ("--site", site_file(stage.folder), "--sweep", "params.variant=a,b", "--json")
    told = json.loads(stage.cfe("submit", path, *words).stdout)
    task = RunFolder(stage.folder / told["run_dir"]).task(1)
    try:
        deadline = time.monotonic() + 60
        while next(task.heartbeats(), None) is None:
            assert time.monotonic() < deadline, list(task.events())
            time.sleep(0.1)
        with dialogue("debug", "--attach", task.run_id, cwd=stage.folder, env=stage.cluster.env) as shown:
            shown.expect_exact(PROMPT)
            shown.sendline('echo "$RANK of $WORLD_SIZE in $SLURM_ARRAY_JOB_ID: $CFE_RUN_DIR"')
            shown.expect_exact(f"0 of 1 in {told['job_id']}: {task.path}")
            shown.expect_exact(PROMPT)
            shown.sendline("exit")
            assert shown.ended() == 0
        assert task.result() is None
    finally:
        stage.cfe("cancel", told["sweep_id"])


CASES = [
    a_session_that_waits_is_seen_and_cancelled,
    a_task_of_a_sweep_is_reached_by_its_number,
    pdb_holds_the_first_of_two_ranks_in_the_debug_partition,
    a_shell_starts_the_job_as_often_as_one_likes,
    a_shell_beside_a_running_rank_leaves_it_alone,
]
