"""What submitting a large sweep costs: 1,500 tasks on a site whose MaxArraySize is 1001, against one plain array of
submitit of 1,000, whole processes in turn.

`python tests/benchmarks/bench_sweep.py [--runs 7] [--json FILE]` brings a cluster up for itself. Every array waits for
a job that never starts, so that nothing runs meanwhile. Exit status 1 when the ratio is not below 3, more than 20 files
are written, or Slurm does not hold every task. Byte code is cached, for all the commands alike, as it is after an
installation by pip.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slurm.cluster import Cluster

TASKS = 1500
MOST = 1000
RATIO_LIMIT = 3.0
FILES_LIMIT = 20

SUBMITIT = f"""\
import submitit


def work(number):
    return number


executor = submitit.AutoExecutor(folder="submitit-logs")
executor.update_parameters(slurm_partition="gpu", timeout_min=5, nodes=1, tasks_per_node=1, cpus_per_task=1,
                           slurm_additional_parameters={{"dependency": "afterok:BLOCKER"}})
print(executor.map_array(work, range({MOST}))[0].job_id)
"""

JOB = """\
name = "bench"
command = ["true", "{params.x}"]

[resources]
partition = "gpu"
time = "5m"

[sweep.axes.params]
x = { range = [0, TASKS] }
"""


@dataclass(frozen=True)
class Row:
    """One command: whole-process seconds, and what it left behind."""

    name: str
    tasks: int
    median_s: float
    fastest_s: float
    slowest_s: float
    files: int
    size_bytes: int
    sbatch_calls: int
    queued: int


def measure(folder: Path, runs: int) -> list[Row]:
    """Run each command once to warm up, then both in turn, `runs` times."""
    blocker = subprocess.run(
        ["sbatch", "--parsable", "--hold", "-p", "gpu", "-t", "5", "-o", "/dev/null", "--wrap", "true"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()
    (folder / "ten.py").write_text(SUBMITIT.replace("BLOCKER", blocker))
    (folder / "bench.toml").write_text(JOB.replace("TASKS", str(TASKS)))
    python = [sys.executable]
    ours = [*python, "-m", "cfe_hpc", "submit", "bench.toml", "--site", "minislurm", "--json"]
    # Options of the profile go to every array.
    ours += ["--set", f"site.storage.runs_root={folder / 'runs'}", "--set"]
    ours += [f'site.partitions.gpu.options=["--dependency=afterok:{blocker}"]']
    commands = {
        f"submitit, one array of {MOST}": ([*python, "ten.py"], folder / "submitit-logs", MOST),
        f"cfe-hpc submit, {TASKS} tasks": (ours, folder / "runs", TASKS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    left: dict[str, tuple[int, int, int, int]] = {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    for turn in range(runs + 1):
        for name, (argv, writes, _) in commands.items():
            shutil.rmtree(writes, ignore_errors=True)
            began_s = time.perf_counter()
            # With a time limit, subprocess would look for the end in steps of up to 50 ms.
            subprocess.run(argv, cwd=folder, env=environment, check=True, capture_output=True)
            if turn:
                seconds[name].append(time.perf_counter() - began_s)
            left[name] = (*_written(writes), *_queued(blocker))
            _cancel_but(blocker)
    subprocess.run(["scancel", blocker], check=True, timeout=60)
    return [
        Row(
            name=name,
            tasks=tasks,
            median_s=statistics.median(seconds[name]),
            fastest_s=min(seconds[name]),
            slowest_s=max(seconds[name]),
            files=left[name][0],
            size_bytes=left[name][1],
            sbatch_calls=left[name][2],
            queued=left[name][3],
        )
        for name, (_, _, tasks) in commands.items()
    ]


def _written(folder: Path) -> tuple[int, int]:
    """(files, bytes) below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return len(files), sum(path.stat().st_size for path in files)


def _queued(blocker: str) -> tuple[int, int]:
    """(arrays, tasks) in the queue, beside what they wait for."""
    shown = _asked("squeue", "-h", "-r", "-o", "%F")
    jobs = [job for job in shown.split() if job != blocker]
    return len(set(jobs)), len(jobs)


def _cancel_but(blocker: str) -> None:
    """Cancel all jobs but one: what piles up would disturb the clock."""
    jobs = {job for job in _asked("squeue", "-h", "-o", "%F").split() if job != blocker}
    if jobs:
        subprocess.run(["scancel", *sorted(jobs)], check=True, timeout=60)
    deadline_s = time.monotonic() + 60
    while _queued(blocker)[1]:
        if time.monotonic() > deadline_s:
            raise TimeoutError("cancelled arrays are still in the queue")
        time.sleep(0.2)


def _asked(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def verdicts(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """(what is claimed, whether it holds)."""
    theirs, ours = rows
    ratio = ours.median_s / theirs.median_s
    claims: list[tuple[str, Callable[[], bool]]] = [
        (f"{ratio:.2f} x submitit's array of {theirs.tasks} (limit {RATIO_LIMIT:g})", lambda: ratio < RATIO_LIMIT),
        (f"{ours.files} files before tasks start (limit {FILES_LIMIT})", lambda: ours.files <= FILES_LIMIT),
        (f"{ours.queued} of {ours.tasks} tasks in the queue", lambda: ours.queued == ours.tasks),
    ]
    return [(text, holds()) for text, holds in claims]


@contextmanager
def scheduler() -> Iterator[None]:
    """A cluster of our own, that goes on taking jobs though it remembers those of all turns."""
    cluster = Cluster.start("--conf", "MaxJobCount=100000")
    os.environ["SLURM_CONF"] = cluster.env["SLURM_CONF"]
    try:
        yield
    finally:
        cluster.stop()


def show(rows: Sequence[Row]) -> None:
    """The table."""
    print(
        f"{'whole process':<32}{'median':>9}{'fastest':>9}{'slowest':>9}{'files':>7}{'KiB':>8}{'arrays':>8}{'tasks':>7}"
    )
    for row in rows:
        times = "".join(f"{value * 1000:>7.0f}ms" for value in (row.median_s, row.fastest_s, row.slowest_s))
        size = f"{row.files:>7}{row.size_bytes / 1024:>8.0f}{row.sbatch_calls:>8}{row.queued:>7}"
        print(f"{row.name:<32}{times}{size}")
    for text, good in verdicts(rows):
        print(f"{text}{'' if good else ': MISSED'}")


def main() -> int:
    """Measure, print, and fail when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="measured turns (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-sweep-"))
    try:
        with scheduler():
            rows = measure(folder, args.runs)
    finally:
        shutil.rmtree(folder)
    show(rows)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0 if all(good for _, good in verdicts(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
