"""A new user's first mistakes, made with the real program: each is told in one line that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoint_disks import mounted

SITE = """
name = "mine"
scheduler = "slurm"
default_partition = "gpu"
slurm = { account_required = true }
storage = { runs_root = "runs" }
[hardware.a100]
accelerator = "cuda"
devices_per_node = 4
cores_per_node = 64
memory = "512GiB"
gres = "gpu:a100:{devices}"
[partitions.gpu]
hardware = "a100"
time_limit = "1d"
[partitions.debug]
hardware = "a100"
time_limit = "30m"
"""
JOB = """
name = "mine"
command = ["bash", "-c", "true"]
[resources]
account = "project"
time = "1h"
"""
TRAINING = """
name = "mine"
entry = "cfe_hpc.train.main:run"
params = { data = "tokens.h5" }
[resources]
account = "project"
time = "1h"
"""
RUNS = ("mine-20260101-000000-aaaa", "mine-20260102-000000-bbbb")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A command line, and what it ends with.

    Attributes:
        words: of the command line; {here} is the folder it is given in.
        error: the one line, after `error: `.
        job: the job file there.
        path: of PATH, None for this process's own.
    """

    words: str
    status: int
    error: str
    job: str = JOB
    path: str | None = None


MISTAKES = {
    "wrong partition": Mistake(
        words="submit job.toml --site site.toml --set resources.partition=gpuu",
        status=2,
        error="--set: resources.partition: no such partition at mine (gpuu); did you mean gpu? mine has: gpu, debug",
    ),
    "missing account": Mistake(
        words="submit job.toml --site site.toml",
        job=JOB.replace('account = "project"\n', ""),
        status=4,
        error="job.toml: resources.account: every job must name an account here, and this one names none; set account "
        "to your project's",
    ),
    "too long": Mistake(
        words="submit job.toml --site site.toml --set resources.time=3d",
        status=4,
        error="--set: resources.time: longer than the 1d of partition gpu (3d); ask for less: the run goes on in "
        "further attempts",
    ),
    "too many devices": Mistake(
        words="submit job.toml --site site.toml --set resources.devices_per_node=8",
        status=4,
        error="--set: resources.devices_per_node: more than the 4 devices of a node of a100 (8); ask for fewer, on "
        "more nodes",
    ),
    "no data": Mistake(
        words="submit job.toml",
        job=TRAINING,
        status=4,
        error="job.toml: params.data: no such token file (tokens.h5); build it with `cfe-hpc data build`, or check the "
        "path",
    ),
    "typo in a key": Mistake(
        words="submit job.toml --site site.toml",
        job=JOB.replace("account", "acount"),
        status=2,
        error='job.toml: resources.acount: unknown key ("project"); did you mean account? valid here: nodes, ',
    ),
    "job file not found": Mistake(
        words="submit jbo.toml",
        status=2,
        error="jbo.toml: no such job file; did you mean job.toml? give a path, or one of: ",
    ),
    "RUN ambiguous": Mistake(
        words="status mine --site site.toml",
        status=2,
        error=f"mine: means 2 runs ({', '.join(RUNS)}); give more of the run id",
    ),
    "Slurm missing": Mistake(
        words="submit job.toml --site site.toml --ignore workdir-private --ignore runs-root-private",
        path="/nowhere",
        status=3,
        error="sbatch: command not found; submit from a machine that has Slurm's commands, or use --site local",
        job=JOB.replace('"bash"', '"/bin/bash"'),
    ),
    "disk full": Mistake(
        words="submit job.toml --set site.storage.runs_root={here}/full/runs",
        status=4,
        error="--set: storage.runs_root: the disk is full: 0 B and ",
    ),
    "typo in a verb": Mistake(
        words="sumbit job.toml", status=2, error="cfe-hpc: no such verb (sumbit); did you mean submit? "
    ),
    "typo in an option": Mistake(
        words="submit job.toml --sit local",
        status=2,
        error="cfe-hpc submit: no such option (--sit); did you mean --site? see `cfe-hpc submit --help`",
    ),
    "typo in an action": Mistake(
        words="sites lst",
        status=2,
        error="cfe-hpc sites: argument ACTION: no such choice (lst); did you mean list? there are list, ",
    ),
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder of a new user's: a site, two runs, no data."""
    (tmp_path / "site.toml").write_text(SITE)
    for run_id in RUNS:
        (tmp_path / "runs" / "mine" / run_id).mkdir(parents=True)
    return tmp_path


def make(mistake: Mistake, here: Path) -> subprocess.CompletedProcess[str]:
    (here / "job.toml").write_text(mistake.job)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CFE_")}
    return subprocess.run(
        [sys.executable, "-m", "cfe_hpc", *mistake.words.format(here=here).split()],
        cwd=here,
        env=env if mistake.path is None else {**env, "PATH": mistake.path},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def assert_told(mistake: Mistake, done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (mistake.status, ""), done.stderr
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {mistake.error}")
    assert "; " in done.stderr  # what is wrong; what to do


@pytest.mark.parametrize("name", sorted(MISTAKES.keys() - {"disk full"}))
def test_a_mistake_is_told_in_one_line(name: str, here: Path) -> None:
    assert_told(MISTAKES[name], make(MISTAKES[name], here))


def test_a_full_disk_is_told_in_one_line(here: Path) -> None:
    with mounted(here / "full", "-t", "tmpfs", "-o", "size=64k", "none") as disk:
        disk.fill()
        assert_told(MISTAKES["disk full"], make(MISTAKES["disk full"], here))


def test_a_disk_that_has_no_room_for_data_is_told_in_one_line(here: Path) -> None:
    mistake = Mistake(
        words="data build {here}/full/tokens.h5 --stdlib --max-bytes 1MiB",
        status=1,
        error=f"{here}/full/tokens.h5: cannot be written (No space left on device); free space or choose another",
    )
    with mounted(here / "full", "-t", "tmpfs", "-o", "size=64k", "none"):
        assert_told(mistake, make(mistake, here))


def test_output_that_finds_no_room_is_told_in_one_line(here: Path) -> None:
    words = [sys.executable, "-m", "cfe_hpc", "sites", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=here, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        "error: output: No space left on device; make room on that disk\n",
    )


def test_a_disk_that_becomes_full_while_a_run_is_made_leaves_no_half_of_one(here: Path) -> None:
    mistake = Mistake(
        words="submit job.toml --set site.storage.runs_root={here}/full/runs --ignore disk-full",
        status=2,
        error=f"--set: storage.runs_root: cannot be written: No space left on device ({here}/full/runs); make room "
        "there, or name a folder",
    )
    with mounted(here / "full", "-t", "tmpfs", "-o", "size=64k", "none") as disk:
        disk.fill(leaving_bytes=4096)  # run.toml takes more
        done = make(mistake, here)
        assert not (here / "full" / "runs").exists()
    assert_told(mistake, done)
