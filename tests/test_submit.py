"""`submit`, `cancel` and `requeue` as a user types them, on this machine without a scheduler."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from launching import events, kill_quietly

from cfe_hpc.config.run import RunSpec
from cfe_hpc.launch.jobs import all_jobs, latest_job
from cfe_hpc.launch.local import is_alive, start_ticks
from cfe_hpc.runfolder import RunFolder

HEAVY = ("torch", "deepspeed", "h5py", "numpy")
SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def cfe(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """cfe(*words, status=0): run the command line in tmp_path; supervisors left at the end are killed."""

    def run(*words: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "cfe_hpc", *words]
        done = subprocess.run(
            argv, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == status, done.stderr
        return done

    yield run
    for record in tmp_path.glob("runs/*/*/control/job*"):
        job = json.loads(record.read_text())
        if is_alive(job):
            kill_quietly(job["pid"])


def write_job(folder: Path, **keys: Any) -> None:
    (folder / "job.toml").write_text(tomli_w.dumps({"name": "job", "command": ["true"], **keys}))


def submitted(done: subprocess.CompletedProcess[str]) -> RunFolder:
    return RunFolder(Path(json.loads(done.stdout)["run_dir"]))


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("site", ["local", "minislurm"])
def test_a_dry_run_needs_no_slurm_loads_nothing_heavy_and_writes_nothing(tmp_path: Path, site: str) -> None:
    write_job(tmp_path, command=[sys.executable, "-c", "pass"])
    bare = tmp_path / "bin"
    bare.mkdir()
    program = (
        "import sys\nfrom cfe_hpc.cli.main import main\n"
        f"code = main(['submit', 'job.toml', '--site', {site!r}, '--dry-run', '--json'])\n"
        f"sys.exit(code or [name for name in {HEAVY!r} if name in sys.modules] or 0)\n"
    )
    environment = {**os.environ, "PATH": str(bare), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document.items() >= {"job_id": None, "site": site, "nodes": 1, "world_size": 1, "dry_run": True}.items()
    assert document["script"].startswith("#!/bin/bash\n")
    assert document["run_dir"] in document["script"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "job.toml"]


def test_a_dry_run_for_people_shows_plan_and_script(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path)
    printed = cfe("submit", "job.toml", "--site", "minislurm", "--dry-run").stdout
    assert printed.startswith("job         'job' (job.toml)\n")
    assert "\n#SBATCH --requeue\n" in printed
    assert not (tmp_path / "runs").exists()


def test_submit_prints_the_contract_and_freezes_the_run(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path, params={"lr": 0.1})
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "job.toml"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=u", "-c", "user.email=u@example.org"]
    subprocess.run(["git", *identity, "commit", "-q", "-m", "m"], cwd=tmp_path, check=True)
    write_job(tmp_path, params={"lr": 0.2})
    done = cfe("submit", "job.toml", "--set", "params.lr=0.3", "--wait", "--json")
    document = json.loads(done.stdout)
    assert list(document) == ["run_id", "run_dir", "job_id", "site", "partition", "nodes", "world_size"]
    folder = submitted(done)
    assert folder.run_id == document["run_id"]
    spec = RunSpec.read(folder.run_toml)
    assert (spec.job.params, spec.origins["job.params.lr"]) == ({"lr": 0.3}, "--set")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    diff = subprocess.run(["git", "diff", "HEAD"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert spec.provenance.git_commit == head.stdout.strip()
    assert spec.provenance.git_diff_sha256 == hashlib.sha256(diff).hexdigest()
    assert spec.provenance.workdir == str(tmp_path)
    assert "submitit" in spec.provenance.versions
    assert [event["event"] for event in folder.events()] == ["submitted", "started", "completed"]
    assert "COMPLETED" in done.stderr.splitlines()[-1]


def test_submit_says_what_a_preemption_does_where_there_are_some(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path)
    preemption = 'site.partitions.local.preemption={mode = "requeue", grace = "30s"}'
    said = cfe("submit", "job.toml", "--set", preemption, "--wait").stderr
    assert said.startswith(
        "preemption: requeue: TERM, 30s to save; all ranks save, the next attempt follows; "
        "how long a save takes is not known yet\n"
    )


def test_wait_ends_with_1_when_the_run_fails(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path, command=["false"])
    assert "FAILED" in cfe("submit", "job.toml", "--wait", status=1).stderr.splitlines()[-1]


def test_interrupting_the_wait_leaves_the_run_going(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path, command=SLEEPS)
    argv = [sys.executable, "-m", "cfe_hpc", "submit", "job.toml", "--wait", "--json"]
    # Whoever runs the tests in the background of a script has this signal ignored, and so would the process have it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        wait_until(lambda: list(tmp_path.glob("runs/job/*/control/job")))
        (run_dir,) = tmp_path.glob("runs/job/*")
        folder = RunFolder(run_dir)
        wait_until(lambda: events(folder, "started"))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert f"{folder.run_id} goes on" in said
    job = latest_job(folder)
    assert job is not None and is_alive(job)


def test_cancel_ends_a_local_run_and_says_when_it_had_ended(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path, command=SLEEPS)
    folder = submitted(cfe("submit", "job.toml", "--json"))
    wait_until(lambda: events(folder, "started"))
    assert json.loads(cfe("cancel", folder.run_id, "--json").stdout)["action"] == "cancelled"
    cfe("cancel", folder.run_id)
    wait_until(folder.result)
    assert (folder.result() or {})["state"] == "CANCELLED"
    assert cfe("cancel", folder.run_id).stdout == f"{folder.run_id}: ended before: CANCELLED\n"
    assert "never requeued" in cfe("requeue", folder.run_id, status=2).stderr
    assert len(events(folder, "cancelled")) == 1


def test_a_cancel_that_comes_while_the_job_script_prepares_is_not_lost(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path, command=SLEEPS)
    setup = 'site.environment.setup=["touch preparing", "sleep 2"]'
    folder = submitted(cfe("submit", "job.toml", "--set", setup, "--json"))
    wait_until(lambda: list(tmp_path.rglob("preparing")))
    cfe("cancel", folder.run_id)
    wait_until(folder.result)
    assert (folder.result() or {})["state"] == "CANCELLED"


def test_a_run_waits_for_another_and_can_be_cancelled_meanwhile(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path, command=SLEEPS)
    first = submitted(cfe("submit", "job.toml", "--json"))
    second = submitted(cfe("submit", "job.toml", "--after", first.run_id, "--json"))
    cfe("cancel", second.run_id)
    wait_until(second.result)
    assert (second.result() or {})["state"] == "CANCELLED"
    assert not events(second, "started")
    assert first.result() is None


def test_after_a_run_that_failed_nothing_is_submitted(cfe: Callable[..., Any], tmp_path: Path) -> None:
    write_job(tmp_path, command=["false"])
    first = submitted(cfe("submit", "job.toml", "--wait", "--json", status=1))
    said = cfe("submit", "job.toml", "--after", first.run_id, status=2).stderr
    assert said.splitlines()[-1] == (
        f"error: --after: {first.run_id}: ended FAILED; requeue it, or submit without --after"
    )
    assert [path.name for path in tmp_path.glob("runs/job/*")] == [first.run_id]


def test_requeue_goes_on_with_a_failed_run_and_refuses_a_completed_one(cfe: Callable[..., Any], tmp_path: Path) -> None:
    fails_once = "import os, sys; sys.exit(int(os.environ['CFE_ATTEMPT'] == '0'))"
    write_job(tmp_path, command=[sys.executable, "-c", fails_once])
    folder = submitted(cfe("submit", "job.toml", "--wait", "--json", status=1))
    assert json.loads(cfe("requeue", folder.run_id, "--json").stdout)["action"] == "resubmitted"
    wait_until(lambda: (folder.result() or {}).get("state") == "COMPLETED")
    assert [job["attempt_base"] for job in all_jobs(folder)] == [0, 1]
    assert "has completed" in cfe("requeue", folder.run_id, status=2).stderr


def test_a_runs_root_that_cannot_be_written_is_refused_before_anything_is_made(
    cfe: Callable[..., Any], tmp_path: Path
) -> None:
    write_job(tmp_path)
    (tmp_path / "file").write_text("")
    said = cfe("submit", "job.toml", "--set", "site.storage.runs_root=file/runs", status=4).stderr
    assert "storage.runs_root: cannot be written" in said


def test_without_slurm_a_submission_there_is_refused_and_leaves_nothing(
    cfe: Callable[..., Any], tmp_path: Path
) -> None:
    write_job(tmp_path)
    said = cfe("submit", "job.toml", "--site", "minislurm", status=3, PATH="/nonexistent").stderr
    assert said.splitlines()[-1].startswith("error: sbatch: command not found; submit from a machine")
    assert not (tmp_path / "runs").exists()


def test_a_process_is_told_from_another_with_its_number() -> None:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    assert is_alive({"pid": os.getpid(), "start_ticks": ticks})
    assert not is_alive({"pid": os.getpid(), "start_ticks": ticks - 1})
    assert start_ticks(2**22 + 1) is None
