"""The launch side against the real Slurm: hostile values, what a run folder holds, refusals, the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from launching import events
from slurm.cluster import Cluster
from test_launch_script import HOSTILE

from cfe_hpc.launch.jobs import all_jobs
from cfe_hpc.launch.queue import queue
from cfe_hpc.runfolder import RunFolder

pytestmark = pytest.mark.slurm

WRITE_DOWN = """
import json, os, sys
with open(os.path.join(os.environ["CFE_RUN_DIR"], "seen"), "wb") as stream:
    stream.write(b"\\0".join([os.environb[b"VALUE"], os.fsencode(sys.argv[1]), os.fsencode(os.getcwd())]))
"""


def cfe(cluster: Cluster, *words: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cfe_hpc", *words], cwd=cwd, env=cluster.env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stderr
    return done


def submit(cluster: Cluster, cwd: Path, *words: str, **job: Any) -> tuple[RunFolder, str]:
    """Submit a job file made of `job`; the run folder and the job id."""
    table = {"name": "job", "resources": {"partition": "gpu", "time": "5m", "memory": "100MiB"}, **job}
    (cwd / "job.toml").write_text(tomli_w.dumps(table))
    done = cfe(cluster, "submit", "job.toml", "--site", "minislurm", "--json", *words, cwd=cwd)
    document = json.loads(done.stdout)
    return RunFolder(Path(document["run_dir"])), document["job_id"]


def test_hostile_names_paths_variables_and_parameters_arrive_byte_for_byte(cluster: Cluster, tmp_path: Path) -> None:
    sent = {}
    for text in HOSTILE:
        workdir = tmp_path / f"{text} workdir"
        workdir.mkdir()
        sent[text] = (
            workdir,
            *submit(
                cluster,
                workdir,
                name=text,
                command=[sys.executable, "-c", WRITE_DOWN, "{params.text}"],
                params={"text": text},
                launch={"environment": {"VALUE": text}},
            ),
        )
    for text, (workdir, folder, job_id) in sent.items():
        assert cluster.wait_for_end(job_id) == "COMPLETED", text
        seen = (folder.path / "seen").read_bytes().split(b"\0")
        assert seen == [text.encode(), text.encode(), os.fsencode(workdir)]
        assert (folder.logs / f"{job_id}.0.0.out").exists()
        assert (folder.result() or {})["state"] == "COMPLETED"
    assert not list(tmp_path.rglob("pwned"))


def test_the_run_folder_holds_what_it_should_and_no_clutter(cluster: Cluster, tmp_path: Path) -> None:
    folder, job_id = submit(cluster, tmp_path, "--set", 'resources.time="1h"', command=["sleep", "600"])
    made = {path.name for path in folder.path.iterdir()} - {"heartbeat.ndjson"}
    assert made == {"run.toml", "submission.sh", "events.ndjson", "logs", "checkpoints", "control", "start.py"}
    assert all_jobs(folder)[0]["job_id"] == job_id
    assert events(folder, "submitted")[0]["detail"]["job_id"] == job_id
    shown = cluster.job(job_id)
    assert (shown["Requeue"], shown["TimeLimit"], shown["Partition"]) == ("1", "01:00:00", "gpu")
    # The very script that --dry-run shows, but for the run's own folder.
    again = cfe(cluster, "submit", "job.toml", "--site", "minislurm", "--set", 'resources.time="1h"', "--dry-run",
                "--json", cwd=tmp_path)  # fmt: skip
    preview = json.loads(again.stdout)
    expected = preview["script"].replace(preview["run_dir"], str(folder.path))
    assert folder.submission_script.read_text() == expected


def test_a_refused_job_leaves_nothing_and_says_what_sbatch_said(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('name = "job"\ncommand = ["true"]\n')
    words = ["submit", "job.toml", "--site", "minislurm", "--set", "site.partitions.gpu.queue=nonesuch"]
    done = cfe(cluster, *words, cwd=tmp_path, status=3)
    assert done.stderr.splitlines()[-1] == (
        "error: sbatch: refused the job (invalid partition specified: nonesuch; Batch job submission failed: "
        "Invalid partition name specified); name one that `sinfo` lists: [resources] partition, or `queue` in the "
        "site profile"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]


def test_an_unreachable_scheduler_is_exit_3(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('name = "job"\ncommand = ["true"]\n')
    done = subprocess.run(
        [sys.executable, "-m", "cfe_hpc", "submit", "job.toml", "--site", "minislurm"],
        cwd=tmp_path,
        env={name: value for name, value in cluster.env.items() if name != "SLURM_CONF"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3
    assert "SLURM_CONF" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_one_call_tells_the_states_of_many_jobs(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    held = cluster.sbatch("--hold", "-p", "gpu", "--mem=10", "--wrap", "true", cwd=tmp_path)
    runs = cluster.sbatch("-p", "gpu", "--mem=10", "--wrap", "sleep 60", cwd=tmp_path)
    cluster.wait_for_state(runs, "RUNNING")
    states = queue([held, runs, "99999999"])
    assert {job_id: state.state for job_id, state in states.items()} == {held: "HELD", runs: "RUNNING"}
    assert states[held].reason == "JobHeldUser"
    assert states[runs].nodes == cluster.job(runs)["NodeList"]
    assert queue(["99999999"]) == {}
