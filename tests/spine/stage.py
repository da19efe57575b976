"""A case of a test on a shared cluster: it submits into a folder of its own, and looks at what becomes of its runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster

from spine.harness import LiveRun, cfe, site_file, write_job

STEPS = 40
TOTAL = sum(range(STEPS))


class Stage:
    """A case's own folder on the shared cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)

    def submit(
        self,
        partition: str,
        *,
        nodes: int = 1,
        site: str | None = None,
        words: tuple[str, ...] = (),
        **tables: Any,
    ) -> LiveRun:
        """Submit a job; `counting` unless the tables name another entry or a command.

        Args:
            words: further options of the verb.
        """
        job: dict[str, Any] = {
            "name": "stop",
            "resources": {
                "nodes": nodes,
                "devices_per_node": 1,
                "cpus_per_device": 8,
                "time": "20m",
                "partition": partition,
            },
            "params": {"steps": STEPS, "pause_s": 0.25, "variant": "a"},
            **tables,
        }
        if "command" not in job:
            job.setdefault("entry", "entries:counting")
        path = write_job(self.folder, **job)
        site = site or site_file(self.folder)
        return LiveRun.submit(path, site, cwd=self.folder, env=self.cluster.env, words=words)

    def cfe(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """`cfe-hpc WORDS` in the case's folder; fails unless it ends with this status."""
        done = cfe(*words, cwd=self.folder, env=self.cluster.env)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def status(self, run: LiveRun) -> dict[str, Any]:
        """What `status --json` says of the run."""
        (status,) = json.loads(self.cfe("status", run.run_id, "--json").stdout)
        return dict(status)

    def requeued(self, run: LiveRun, times: int) -> None:
        """Wait until Slurm has requeued the run so often, and let it start at once."""
        run.wait(lambda: self.cluster.restarts(run.job_id) == times, 90, f"requeued {times} times")
        self.cluster.resume(run.job_id)


def reasons(run: LiveRun) -> list[Any]:
    """Why the run was requeued, each time."""
    return [event["reason"] for event in run.events("requeued")]


def assert_counted(run: LiveRun, *, attempts: int, lost_steps: int = 0) -> None:
    """The run completed, and its total tells that every step counts once."""
    result = run.wait_result()
    told = (result["state"], result["attempts"], result["lost_steps"], result["metrics"]["total"])
    assert told == ("COMPLETED", attempts, lost_steps, TOTAL), run.diagnosis()


def ended(run: LiveRun, state: str, timeout_s: float = 120.0) -> dict[str, Any]:
    """Wait for a result that says so."""

    def there() -> dict[str, Any] | None:
        result = run.folder.result()
        return result if result is not None and result["state"] == state else None

    return run.wait(there, timeout_s, state)


def rank_pids(run: LiveRun) -> dict[int, int]:
    """Process id of each rank on this machine: the one that slurmstepd started, or a launcher, in which all exec'd."""
    return _pids(run)[1] or _pids(run)[0]


def agent_pids(run: LiveRun) -> dict[int, int]:
    """Process id of each node's agent, by the node's number: the process that slurmstepd started, and signals."""
    return _pids(run)[0]


def _pids(run: LiveRun) -> tuple[dict[int, int], dict[int, int]]:
    """(tasks of the step, ranks that a launcher has started): process ids by task and by rank."""
    tasks: dict[int, int] = {}
    workers: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = dict(pair.partition(b"=")[::2] for pair in (folder / "environ").read_bytes().split(b"\0"))
        except (OSError, ValueError):
            continue
        if b"cfe_hpc.ranks" in words and os.fsencode(run.folder.path) in words:
            by_launcher = b"CFE_WORKER" in environment
            number = int(environment[b"CFE_RANK" if by_launcher else b"SLURM_PROCID"])
            (workers if by_launcher else tasks)[number] = int(folder.name)
    return tasks, workers


@contextlib.contextmanager
def on_one_cluster(
    cases: Mapping[str, Callable[[Stage], None]], root: Path, *options: str, at_a_time: int
) -> Iterator[dict[str, Future[None]]]:
    """Each case's outcome, by its name; all of them begin now, a few at a time.

    Args:
        root: each case gets a folder below.
        options: of `scripts/slurm up`.
    """
    cluster = Cluster.start(*options)
    pool = ThreadPoolExecutor(at_a_time)
    try:
        yield {name: pool.submit(case, Stage(cluster, root / name)) for name, case in cases.items()}
    finally:
        pool.shutdown(cancel_futures=True)
        cluster.stop()
