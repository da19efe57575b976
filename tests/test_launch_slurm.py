"""The launch side against the real Slurm: hostile values, refusals, cancel, requeue, successors."""

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
from cfe_hpc.ranks.successor import submit_successor
from cfe_hpc.runfolder import RunFolder

pytestmark = pytest.mark.slurm

WRITE_DOWN = """
import json, os, sys
with open(os.path.join(os.environ["CFE_RUN_DIR"], "seen"), "wb") as stream:
    stream.write(b"\\0".join([os.environb[b"VALUE"], os.fsencode(sys.argv[1]), os.fsencode(os.getcwd())]))
"""

# Ends on the first signal, and at once in every attempt but the first.
UNTIL_TOLD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
print("up", flush=True)
time.sleep(0 if attempt else 600)
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


def wait_for_event(cluster: Cluster, folder: RunFolder, *names: str) -> dict[str, Any]:
    found = cluster.wait_for(lambda: events(folder, *names), 60, f"event {names} in {list(folder.events())}")
    return found[0]


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
    assert made == {"run.toml", "submission.sh", "events.ndjson", "logs", "checkpoints", "control", "submitit"}
    assert {path.name for path in (folder.path / "submitit").iterdir()} == {"task.pkl", f"{job_id}_submitted.pkl"}
    assert (folder.path / "submitit" / "task.pkl").stat().st_size < 1000
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


def test_cancel_ends_waiting_and_running_runs_for_good(cluster: Cluster, tmp_path: Path) -> None:
    first, first_id = submit(cluster, tmp_path, command=[sys.executable, "-c", UNTIL_TOLD])
    second, second_id = submit(cluster, tmp_path, "--after", first_id, command=["true"])
    assert "afterok" in cluster.job(second_id)["Dependency"]
    wait_for_event(cluster, first, "started")
    assert json.loads(cfe(cluster, "cancel", second_id, "--json", cwd=tmp_path).stdout)["action"] == "cancelled"
    assert (second.result() or {})["state"] == "CANCELLED"
    assert events(second, "cancelled")
    cfe(cluster, "cancel", str(first.path), cwd=tmp_path)
    assert cluster.wait_for_end(first_id) == "CANCELLED"
    cluster.wait_for(first.result, 30, "the ranks write the result")
    assert (first.result() or {})["state"] == "CANCELLED"
    assert "ended before: CANCELLED" in cfe(cluster, "cancel", first_id, cwd=tmp_path).stdout
    refused = cfe(cluster, "requeue", first_id, cwd=tmp_path, status=2).stderr
    assert "a cancelled run is never requeued" in refused
    assert cluster.restarts(first_id) == 0


def test_requeue_sends_a_running_run_back_to_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    folder, job_id = submit(cluster, tmp_path, command=[sys.executable, "-c", UNTIL_TOLD])
    cluster.wait_for(lambda: "up" in _logged(folder), 60, "the command runs")
    assert json.loads(cfe(cluster, "requeue", job_id, "--json", cwd=tmp_path).stdout)["action"] == "signalled"
    cluster.wait_for_restart(job_id, 1)
    cluster.resume(job_id)
    assert cluster.wait_for_end(job_id) == "COMPLETED"
    assert [event["reason"] for event in events(folder, "requeued")] == ["requeue_requested"]


def test_requeue_goes_on_with_a_failed_run_as_a_new_job(cluster: Cluster, tmp_path: Path) -> None:
    fails_once = "import os, sys; sys.exit(int(os.environ['CFE_ATTEMPT_BASE'] == '0'))"
    folder, job_id = submit(cluster, tmp_path, command=[sys.executable, "-c", fails_once])
    cluster.wait_for(folder.result, 60, "the failure is written")
    outcome = json.loads(cfe(cluster, "requeue", folder.run_id, "--json", cwd=tmp_path).stdout)
    assert outcome["action"] == "resubmitted"
    assert cluster.wait_for_end(outcome["job_id"]) == "COMPLETED"
    assert [job["job_id"] for job in all_jobs(folder)] == [job_id, outcome["job_id"]]
    assert (folder.logs / f"{outcome['job_id']}.1.0.out").exists()
    assert (folder.result() or {})["state"] == "COMPLETED"


def test_a_run_that_its_partition_cancels_goes_on_in_a_successor(cluster: Cluster, tmp_path: Path) -> None:
    resources = {"partition": "spot-cancel", "time": "5m"}
    folder, job_id = submit(cluster, tmp_path, resources=resources, command=[sys.executable, "-c", UNTIL_TOLD])
    cluster.wait_for(lambda: "up" in _logged(folder), 60, "the command runs")
    preemptor = cluster.preempt(job_id)
    successor = cluster.wait_for(lambda: folder.promised("job-1"), 60, "a successor")["job_id"]
    cluster.wait_for_end(job_id)
    cluster.scancel(preemptor)
    assert cluster.wait_for_end(successor) == "COMPLETED"
    assert (folder.logs / f"{successor}.1.0.out").read_text() == "up\n"
    assert (folder.result() or {})["state"] == "COMPLETED"


def test_a_successor_inherits_nothing_of_the_step_that_sends_it(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = "import os; print(os.environ.get('SBATCH_PARTITION'), os.environ['CFE_ATTEMPT_BASE'], os.environ['RANK'])"
    folder, job_id = submit(cluster, tmp_path, command=[sys.executable, "-c", show])
    cluster.wait_for_end(job_id)
    for name, value in {"SLURM_CONF": cluster.env["SLURM_CONF"], "SBATCH_PARTITION": "none", "RANK": "77",
                        "SLURM_NTASKS": "9", "CFE_ATTEMPT_BASE": "5"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    successor = submit_successor(folder, job_id=job_id, next_attempt=4)
    assert cluster.wait_for_end(successor) == "COMPLETED"
    assert (folder.logs / f"{successor}.4.0.out").read_text() == "None 4 0\n"


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


def _logged(folder: RunFolder) -> str:
    return "".join(path.read_text() for path in folder.logs.glob("*.out"))
