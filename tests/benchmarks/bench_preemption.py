"""What real preemptions cost: the same training under plain submitit, and under cfe_hpc, on the same cluster.

`python tests/benchmarks/bench_preemption.py [--preemptions 3] [--steps 100] [--json FILE]` brings a cluster of
scripts/slurm up, runs both side by side on nodes of their own, and has each preempted by jobs of a higher tier. The
training is a loop of two ranks that writes a line a step; what was executed beyond the steps of the run was lost.
submitit is used as its documentation says: a callable with a `checkpoint` method, on the partition's own grace time.
The limit is a run that loses nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slurm.cluster import ENDED, Cluster
from spine.harness import LiveRun, site_file, write_job

STEP_S = 0.25

UNDER_SUBMITIT = '''\
import json, pathlib, sys, time
import submitit

class Training:
    """Saves where submitit's documentation says: in checkpoint()."""

    def __init__(self, folder, steps):
        self.folder, self.steps, self.done = folder, steps, 0

    def __call__(self):
        rank = submitit.JobEnvironment().global_rank
        for self.done in range(self.done, self.steps):
            time.sleep(%(step_s)s)
            if rank == 0:
                with open(f"{self.folder}/steps.log", "a") as log:
                    log.write(f"{self.done}\\n")

    def checkpoint(self):
        return submitit.helpers.DelayedSubmission(self)

if __name__ == "__main__":
    executor = submitit.SlurmExecutor(folder="logs", max_num_timeout=100)
    executor.update_parameters(partition="spot", nodes=2, ntasks_per_node=1, time=20, cpus_per_task=8,
                               signal_delay_s=8, job_name="plain")
    print(executor.submit(Training(str(pathlib.Path.cwd()), %(steps)d)).job_id)
'''

UNDER_CFE_HPC = """\
import sys, time
import cfe_hpc

run = cfe_hpc.join()
for step in run.steps(%(steps)d):
    time.sleep(%(step_s)s)
    if run.rank == 0:
        with open("steps.log", "a") as log:
            log.write(f"{step}\\n")
"""


@dataclass(frozen=True)
class Row:
    """One way to run the training."""

    name: str
    steps: int
    executed: int
    lost: int
    seconds: float
    restarts: int

    @property
    def of_limit(self) -> float:
        """Steps executed, as a multiple of the steps of the run."""
        return self.executed / self.steps


def count(folder: Path) -> int:
    log = folder / "steps.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def start_plain(cluster: Cluster, folder: Path, steps: int) -> str:
    words = {"step_s": STEP_S, "steps": steps}
    (folder / "plain.py").write_text(UNDER_SUBMITIT % words)
    return cluster.run(sys.executable, "plain.py", cwd=folder).strip()


def start_ours(cluster: Cluster, folder: Path, steps: int) -> str:
    (folder / "train.py").write_text(UNDER_CFE_HPC % {"step_s": STEP_S, "steps": steps})
    job = write_job(
        folder,
        name="ours",
        command=[sys.executable, "train.py"],
        resources={"nodes": 2, "devices_per_node": 1, "cpus_per_device": 8, "time": "20m", "partition": "spot"},
    )
    return LiveRun.submit(job, site_file(folder), cwd=folder, env=cluster.env).job_id


def disturb(
    cluster: Cluster, folder: Path, start: Callable[[Cluster, Path, int], str], name: str, steps: int, preemptions: int
) -> Row:
    """Run once, preempted `preemptions` times, each time after another tenth of the steps."""
    folder.mkdir()
    began_s = time.monotonic()
    job_id = start(cluster, folder, steps)
    for _ in range(preemptions):
        before = count(folder)
        cluster.wait_for(lambda before=before: count(folder) >= before + steps // 10, 180, f"{name}: training")
        cluster.preempt_once(job_id, timeout_s=150)
    cluster.wait_for(lambda: cluster.state(job_id) in ENDED, steps * STEP_S * 3 + 180, f"{name}: ended")
    executed = count(folder)
    return Row(
        name=name,
        steps=steps,
        executed=executed,
        lost=executed - steps,
        seconds=round(time.monotonic() - began_s, 1),
        restarts=cluster.restarts(job_id),
    )


def measure(steps: int, preemptions: int) -> tuple[str, list[Row]]:
    """Slurm's version, and both ways, run at the same time on nodes of their own."""
    ways = (("plain submitit", start_plain), ("cfe_hpc", start_ours))
    with tempfile.TemporaryDirectory(prefix="cfe-bench-") as folder, ThreadPoolExecutor(len(ways)) as pool:
        cluster = Cluster.start("--nodes", "4")
        try:
            futures = [
                pool.submit(disturb, cluster, Path(folder) / name.replace(" ", "-"), start, name, steps, preemptions)
                for name, start in ways
            ]
            return cluster.run("scontrol", "--version").strip(), [future.result() for future in futures]
        finally:
            cluster.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preemptions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    version, rows = measure(args.steps, args.preemptions)
    rows.append(
        Row(name="limit", steps=args.steps, executed=args.steps, lost=0, seconds=args.steps * STEP_S, restarts=0)
    )
    print(f"{version}, 2 nodes, {args.preemptions} preemptions with 10 s of grace, {STEP_S} s a step\n")
    print(f"{'':<16}{'steps':>7}{'executed':>10}{'lost':>7}{'x limit':>9}{'restarts':>10}{'seconds':>9}")
    for row in rows:
        print(
            f"{row.name:<16}{row.steps:>7}{row.executed:>10}{row.lost:>7}{row.of_limit:>9.2f}"
            f"{row.restarts:>10}{row.seconds:>9}"
        )
    if args.json:
        args.json.write_text(json.dumps([{**asdict(row), "of_limit": row.of_limit} for row in rows], indent=2) + "\n")
    return 0 if next(row for row in rows if row.name == "cfe_hpc").lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
