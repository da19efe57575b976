"""What submitting costs: whole processes, interleaved, against a ten-line submitit script and bare sbatch.

`python tests/benchmarks/bench_submit.py [--runs 15] [--json FILE]` uses the cluster that SLURM_CONF names, or brings
one up for itself. Exit status 1 when a ratio is above its limit. Byte code is cached, for all the commands alike, as
it is after an installation by pip.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slurm.cluster import Cluster

TEN_LINES = """\
import submitit


def work():
    return 1


executor = submitit.AutoExecutor(folder="submitit-logs")
executor.update_parameters(slurm_partition="gpu", timeout_min=5, nodes=1, tasks_per_node=1, cpus_per_task=1)
print(executor.submit(work).job_id)
"""

IN_TREE = "cfe-hpc submit, in git"
TREE_FILES = 400

JOB = """\
name = "bench"
command = ["true"]

[resources]
partition = "gpu"
time = "5m"
"""


@dataclass(frozen=True)
class Row:
    """One thing measured: median and spread of whole-process seconds, and its ratio to another row."""

    name: str
    median_s: float
    fastest_s: float
    slowest_s: float
    against: str | None = None
    ratio: float | None = None
    limit: float | None = None

    @property
    def good(self) -> bool:
        return self.limit is None or (self.ratio is not None and self.ratio <= self.limit)


# name: (argv, the row it is compared with, the most its ratio may be)
def cases(folder: Path) -> dict[str, tuple[Sequence[str], str | None, float | None]]:
    """The commands to measure, run in `folder`."""
    python = [sys.executable]
    submit = [*python, "-m", "cfe_hpc", "submit", "bench.toml", "--site", "minislurm"]
    submit += ["--set", f"site.storage.runs_root={folder / 'runs'}", "--json"]
    return {
        "bare interpreter": ([*python, "-c", "pass"], None, None),
        "cfe-hpc --help": ([*python, "-m", "cfe_hpc", "--help"], "bare interpreter", 5.0),
        "cfe-hpc submit --help": ([*python, "-m", "cfe_hpc", "submit", "--help"], "bare interpreter", 5.0),
        "sbatch": (["sbatch", "--parsable", "-p", "gpu", "bare.sh"], "ten lines of submitit", None),
        "ten lines of submitit": ([*python, "ten.py"], None, None),
        "cfe-hpc submit": (submit, "ten lines of submitit", 2.0),
        "cfe-hpc submit --dry-run": ([*submit, "--dry-run"], "ten lines of submitit", None),
        IN_TREE: (submit, "cfe-hpc submit", 1.25),
    }


def work_tree(folder: Path) -> Path:
    """A git work tree of so many files, each with an import or two, and one that is not committed."""
    tree = folder / "tree"
    for number in range(TREE_FILES):
        path = tree / f"package{number % 20}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import os\n" * 100)
    shutil.copy(folder / "bench.toml", tree)
    git = ["git", "-C", str(tree), "-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "code"]):
        subprocess.run([*git, *words], check=True, stdout=subprocess.DEVNULL)
    (tree / "package0" / "module0.py").write_text("import sys\n")
    return tree


def measure(folder: Path, runs: int) -> list[Row]:
    """Run every command once to warm up, then all of them in turn, `runs` times."""
    (folder / "ten.py").write_text(TEN_LINES)
    (folder / "bench.toml").write_text(JOB)
    (folder / "bare.sh").write_text("#!/bin/bash\ntrue\n")
    todo, tree = cases(folder), work_tree(folder)
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    for turn in range(runs + 1):
        for name, (argv, _, _) in todo.items():
            began = time.perf_counter()
            # With a time limit, subprocess would look for the end in steps of up to 50 ms.
            cwd = tree if name == IN_TREE else folder
            subprocess.run(argv, cwd=cwd, env=environment, check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - began)
        # Only what is submitted is of interest; jobs that pile up and run would disturb the clock.
        subprocess.run(["scancel", "--user", str(os.getuid())], check=True, timeout=60)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        Row(
            name=name,
            median_s=medians[name],
            fastest_s=min(seconds[name]),
            slowest_s=max(seconds[name]),
            against=against,
            ratio=None if against is None else medians[name] / medians[against],
            limit=limit,
        )
        for name, (_, against, limit) in todo.items()
    ]


@contextmanager
def scheduler() -> Iterator[None]:
    """A cluster that sbatch reaches."""
    if "SLURM_CONF" in os.environ:
        yield
        return
    cluster = Cluster.start()
    os.environ["SLURM_CONF"] = cluster.env["SLURM_CONF"]
    try:
        yield
    finally:
        cluster.stop()


def show(rows: Sequence[Row]) -> None:
    """The table."""
    print(f"{'whole process':<26}{'median':>9}{'fastest':>9}{'slowest':>9}   ratio")
    for row in rows:
        times = "".join(f"{value * 1000:>7.0f}ms" for value in (row.median_s, row.fastest_s, row.slowest_s))
        ratio = "" if row.ratio is None else f"   {row.ratio:.2f} x {row.against}"
        limit = "" if row.limit is None else f" (limit {row.limit:g}{'' if row.good else ': MISSED'})"
        print(f"{row.name:<26}{times}{ratio}{limit}")


def main() -> int:
    """Measure, print, and fail when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="measured turns (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-submit-"))
    try:
        with scheduler():
            rows = measure(folder, args.runs)
    finally:
        shutil.rmtree(folder)
    show(rows)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
