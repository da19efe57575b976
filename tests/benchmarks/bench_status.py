"""What `status` costs as runs pile up: seconds of the whole process, its peak memory, and calls of squeue.

`python tests/benchmarks/bench_status.py [--runs 20,200,2000,20000] [--live 200] [--slurm] [--json FILE]` makes run
folders as ranks leave them, a tenth of them live, `--live` at the most, of which every fourth waits in the queue and
the others train, and asks about all. "first" has nothing remembered, "next" asks when the site lets squeue be asked
again and every live run has trained on; "at once" asks within the site's poll_interval. With `--slurm` the live runs'
jobs wait in a real queue, else an squeue of our own tells of them. Exit status 1 when a limit is missed.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run_specs import run_spec
from slurm.cluster import Cluster

from cfe_hpc.runfolder import RunFolder

LIMIT_S, LIMIT_RUNS = 0.6, 2000
"""The issue's: over so many runs, of which 200 are live."""

LIMIT_GROWTH = 1.5
"""Peak memory over the most runs, against that over the fewest."""

BEATS, LIVE_BEATS, NEW_BEATS = 30, 1000, 10
_SQUEUE = """\
#!/bin/sh
echo call >> {calls}
cat {answer}
"""


@dataclass(frozen=True)
class Row:
    """One thing measured: median seconds of whole processes, peak memory, and squeue calls of each."""

    runs: int
    live: int
    when: str
    median_s: float
    slowest_s: float
    peak_mib: float
    squeue_calls: float
    limit_s: float | None = None

    @property
    def good(self) -> bool:
        return self.squeue_calls <= 1 and (self.limit_s is None or self.median_s <= self.limit_s)


class Runs:
    """Run folders below `root`, the newest of them live."""

    def __init__(self, root: Path, count: int, job_ids: Sequence[str]) -> None:
        self.root, self.count, self.num_live = root, count, len(job_ids)
        self.training: list[RunFolder] = []
        text = run_spec(scheduler="slurm").dump()
        first = datetime(2026, 1, 1, tzinfo=timezone.utc)
        for number in range(count):
            stamp = (first + timedelta(seconds=number)).strftime("%Y%m%d-%H%M%S")
            name = f"job{number % 7}"
            folder = RunFolder(root / name / f"{name}-{stamp}-{number % 65536:04x}")
            folder.control.mkdir(parents=True)
            folder.run_toml.write_text(text)
            newer = number - (count - len(job_ids))
            job_id = job_ids[newer] if newer >= 0 else None
            self._fill(folder, first + timedelta(seconds=number), job_id, waits=newer >= 0 and newer % 4 == 3)

    def _fill(self, folder: RunFolder, began: datetime, job_id: str | None, *, waits: bool) -> None:
        shown = job_id or "7"
        job = {"job_id": shown, "scheduler": "slurm", "attempt_base": 0}
        (folder.control / "job").write_text(json.dumps(job) + "\n")
        detail = {"job_id": shown, "total_steps": 100_000, "startup_seconds": 5.0, "allocated_s": began.timestamp()}
        submitted = {"time": _rfc(began), "event": "submitted", "detail": {"job_id": shown, "site": "tests"}}
        if waits:
            folder.events_path.write_text(json.dumps(submitted) + "\n")
            return
        events = [
            submitted,
            {"time": _rfc(began, 10), "event": "started", "attempt": 0, "host": "n1", "detail": detail},
            {"time": _rfc(began, 20), "event": "checkpoint_saved", "attempt": 0, "step": 10, "seconds": 1.0},
        ]
        if job_id is None:
            events.append({"time": _rfc(began, 60), "event": "completed", "attempt": 0, "step": BEATS})
            buckets = {"queue": 1.0, "startup": 10.0, "steps": 40.0, "checkpoint": 1.0}
            result = {"state": "COMPLETED", "final_step": BEATS, "lost_steps": 0, "goodput": 0.8, "buckets": buckets}
            folder.result_path.write_text(json.dumps(result, indent=2))
        else:
            self.training.append(folder)
        folder.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
        self._train(folder, began, 0, BEATS if job_id is None else LIVE_BEATS)

    def _train(self, folder: RunFolder, began: datetime, first: int, count: int) -> None:
        with open(folder.heartbeat_path, "a") as stream:
            for step in range(first + 1, first + count + 1):
                beat = {"time": _rfc(began, 10 + step), "attempt": 0, "step": step, "loss": 2.0, "step_seconds": 0.9}
                spent = {"spent": {"step": 0.9, "data": 0.05, "checkpoint": 0.05}, "tokens_per_second": 1e5}
                stream.write(json.dumps({**beat, **spent}) + "\n")

    def train_on(self, turn: int) -> None:
        """Every live run logs some more steps."""
        began = datetime(2026, 1, 1, tzinfo=timezone.utc)
        for folder in self.training:
            self._train(folder, began, LIVE_BEATS + turn * NEW_BEATS, NEW_BEATS)


def _rfc(began: datetime, later_s: float = 0.0) -> str:
    return (began + timedelta(seconds=later_s)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def measure(folder: Path, runs: Runs, turns: int, calls: Callable[[], int]) -> list[Row]:
    """Ask first, next and at once, some turns of each."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "XDG_CACHE_HOME": str(folder / "cache")}
    cache = folder / "cache" / "cfe_hpc"
    _ask(folder, environment)  # byte code
    rows = []
    for when in ("first", "next", "at once"):
        seconds, before = [], calls()
        for turn in range(turns):
            if when == "first":
                shutil.rmtree(cache, ignore_errors=True)
            elif when == "next":
                runs.train_on(turn)
                for answer in cache.glob("squeue-*"):
                    os.utime(answer, (time.time() - 3600, time.time() - 3600))
            seconds.append(_ask(folder, environment))
        asked = (calls() - before) / turns
        if when == "first":
            shutil.rmtree(cache, ignore_errors=True)
        limited = runs.count == LIMIT_RUNS and when != "first"
        rows.append(
            Row(
                runs=runs.count,
                live=runs.num_live,
                when=when,
                median_s=statistics.median(seconds),
                slowest_s=max(seconds),
                peak_mib=_peak_mib(folder, environment),
                squeue_calls=asked,
                limit_s=LIMIT_S if limited else None,
            )
        )
    return rows


def _ask(folder: Path, environment: dict[str, str]) -> float:
    """Seconds of `status --json` over all runs."""
    argv = [sys.executable, "-m", "cfe_hpc", "status", "--json"]
    began = time.perf_counter()
    subprocess.run(argv, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


_PEAK = """\
import sys
from cfe_hpc.cli.main import main
main(["status", "--json"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def _peak_mib(folder: Path, environment: dict[str, str]) -> float:
    """Peak memory of it. What the kernel says of a process that has ended may be its parent's, from before exec."""
    argv = [sys.executable, "-c", _PEAK]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1]) / 1024


def fake_queue(folder: Path, job_ids: Sequence[str]) -> Callable[[], int]:
    """An squeue on PATH that knows the jobs; how often it was called."""
    programs, calls, answer = folder / "bin", folder / "calls", folder / "answer"
    programs.mkdir()
    calls.touch()
    answer.write_text("".join(f"{job_id}|RUNNING|2026-01-01T00:00:00|n1|None\n" for job_id in job_ids))
    (programs / "squeue").write_text(_SQUEUE.format(calls=calls, answer=answer))
    (programs / "squeue").chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return lambda: len(calls.read_text().splitlines())


def real_queue(folder: Path, cluster: Cluster) -> Callable[[], int]:
    """The cluster's squeue, behind a script that counts its calls."""
    os.environ.update({name: cluster.env[name] for name in ("SLURM_CONF", "MINISLURM_DIR")})
    programs, calls, real = folder / "bin", folder / "calls", shutil.which("squeue")
    programs.mkdir()
    calls.touch()
    (programs / "squeue").write_text(f'#!/bin/sh\necho call >> {calls}\nexec {real} "$@"\n')
    (programs / "squeue").chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return lambda: len(calls.read_text().splitlines())


def show(rows: Sequence[Row]) -> None:
    """The table."""
    print(f"{'runs':>6}{'live':>6}  {'when':<9}{'median':>9}{'slowest':>9}{'peak':>10}{'squeue':>8}")
    for row in rows:
        limit = "" if row.limit_s is None else f"   limit {row.limit_s:g} s{'' if row.good else ': MISSED'}"
        times = f"{row.median_s:>8.3f}s{row.slowest_s:>8.3f}s{row.peak_mib:>7.1f}MiB{row.squeue_calls:>8g}"
        print(f"{row.runs:>6}{row.live:>6}  {row.when:<9}{times}{limit}")


def main() -> int:
    """Measure, print, and fail when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="20,200,2000,20000", help="numbers of runs, with commas between")
    parser.add_argument("--live", type=int, default=200, help="of them live, at the most (default 200)")
    parser.add_argument("--turns", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--slurm", action="store_true", help="with the jobs of live runs in a real queue")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    counts = [int(count) for count in args.runs.split(",")]
    cluster = Cluster.start() if args.slurm else None
    rows: list[Row] = []
    path = os.environ["PATH"]
    try:
        job_ids = [str(100_000 + number) for number in range(args.live)]
        if cluster is not None:
            hold = ("--hold", "-p", "gpu", "-t", "10", "-o", "/dev/null", "--wrap", "true")
            with ThreadPoolExecutor(8) as pool:
                job_ids = list(pool.map(lambda _: cluster.sbatch(*hold), range(args.live)))
        for count in counts:
            folder = Path(tempfile.mkdtemp(prefix="bench-status-"))
            try:
                os.environ["PATH"] = path
                calls = fake_queue(folder, job_ids) if cluster is None else real_queue(folder, cluster)
                runs = Runs(folder / "runs", count, job_ids[: max(1, min(args.live, count // 10))])
                rows += measure(folder, runs, args.turns, calls)
            finally:
                shutil.rmtree(folder)
    finally:
        if cluster is not None:
            cluster.stop()
    show(rows)
    growth = max(row.peak_mib for row in rows) / min(row.peak_mib for row in rows)
    print(f"peak memory grows {growth:.2f}-fold (limit {LIMIT_GROWTH:g})")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0 if all(row.good for row in rows) and growth <= LIMIT_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
