"""A handle on the real Slurm of a test session: jobs in, facts out, and the ways to hurt a job."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SCRIPT", "Cluster", "why_impossible"]

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "slurm"

# States in which a job has nothing running any more and will not run again by itself.
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL"})

T = TypeVar("T")


def why_impossible() -> str | None:
    """Why this machine cannot run the tests that need the real Slurm; None when it can."""
    if os.geteuid() != 0:
        return "scripts/slurm needs root"
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    needed = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
    missing = [name for name in needed if not any((Path(folder) / name).exists() for folder in search.split(":"))]
    return f"not installed: {' '.join(missing)} (scripts/test installs them)" if missing else None


class Cluster:
    """One cluster of scripts/slurm. Commands have a time limit; a wait that is too long fails and shows the queue."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**os.environ, "SLURM_CONF": str(root / "etc" / "slurm.conf"), "MINISLURM_DIR": str(root)}
        self._killed: set[str] = set()
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, *options: str) -> Self:
        """Bring a cluster up in a new folder with a short path; `options` are those of `scripts/slurm up`.

        It goes down with stop(), and also when this process dies in any other way.
        """
        cluster = cls(Path(tempfile.mkdtemp(prefix="cfe-slurm-", dir="/tmp")))
        slurm = [sys.executable, str(SCRIPT), "--dir", str(cluster.root)]
        # The guard reads until its standard input closes, which the kernel does for us even after a SIGKILL.
        cluster._guard = subprocess.Popen(
            ["sh", "-c", 'cat; exec "$@"', "sh", *slurm, "down"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            subprocess.run([*slurm, "up", *options], check=True, timeout=120, stdin=subprocess.DEVNULL)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def stop(self) -> None:
        """Take it down: daemons, jobs, folder."""
        assert self._guard is not None and self._guard.stdin is not None
        self._guard.stdin.close()
        if self._guard.wait(timeout=60) != 0:
            raise RuntimeError(f"{self.root}: the cluster could not be taken down")

    # Slurm's commands

    def run(self, *argv: str, timeout_s: float = 30.0, cwd: Path | None = None) -> str:
        """What a command printed. Raises AssertionError with what it said when it failed."""
        done = subprocess.run(
            argv, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)}: exit status {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path | None = None) -> str:
        """Submit; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip().split(";")[0]

    def squeue(self, *arguments: str) -> str:
        return self.run("squeue", "-h", *arguments)

    def scontrol(self, *arguments: str) -> str:
        return self.run("scontrol", *arguments)

    def scancel(self, *arguments: str) -> None:
        self.run("scancel", *arguments)

    def sacct(self, job_id: str, fields: str = "JobID,State,ExitCode") -> list[list[str]]:
        """Accounting's rows of a job, one for each attempt (without its steps). Slurm writes them seconds later."""
        text = self.run("sacct", "-D", "-X", "-n", "-P", "-j", job_id, "-o", fields)
        return [line.split("|") for line in text.splitlines()]

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, key by key. PreemptTime is there only while it can be preempted."""
        text = self.scontrol("show", "job", "-o", job_id).splitlines()[0]
        pairs = (part.partition("=") for part in re.split(r" (?=[A-Z][A-Za-z/:]*=)", text))
        return {key: value.strip() for key, _, value in pairs}

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def restarts(self, job_id: str) -> int:
        return int(self.job(job_id)["Restarts"])

    # Waiting

    def wait_for(self, predicate: Callable[[], T | None], timeout_s: float, what: str = "") -> T:
        """Ask until the answer is true, and return it; fail with the state of the cluster when time is up."""
        deadline = time.monotonic() + timeout_s
        while not (answer := predicate()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s:g} s: {what or predicate}\n{self.diagnosis()}")
            time.sleep(0.2)
        return answer

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 60.0) -> str:
        """Wait until a job is in one of these states; which."""

        def reached() -> str | None:
            state = self.state(job_id)
            if state in ENDED and not ENDED.intersection(states):
                raise AssertionError(f"job {job_id} is {state}, never {' or '.join(states)}\n{self.diagnosis()}")
            return state if state in states else None

        return self.wait_for(reached, timeout_s, f"job {job_id} {' or '.join(states)}")

    def wait_for_restart(self, job_id: str, restarts: int, timeout_s: float = 90.0) -> None:
        """Wait until Slurm has requeued a job this often."""
        self.wait_for(lambda: self.restarts(job_id) >= restarts, timeout_s, f"job {job_id} requeued {restarts} times")

    def wait_for_end(self, job_id: str, timeout_s: float = 120.0) -> str:
        """Wait until a job has ended for good; the state it ended in."""
        return self.wait_for_state(job_id, *ENDED, timeout_s=timeout_s)

    # Hurting

    def preempt(self, job_id: str) -> str:
        """Send a job of a higher tier to a running job's nodes; its id. Cancel it to let the other run again."""
        job = self.job(job_id)
        return self.sbatch(
            *("-J", "preemptor", "-p", "gpu", "-N", job["NumNodes"].split("-")[0], "-w", job["NodeList"]),
            *("--exclusive", "--mem=0", "-t", "10", "-o", "/dev/null", "--wrap", "sleep 600"),
        )

    def hurry(self, job_id: str) -> None:
        """Start a requeued job now: Slurm lets it wait for up to two minutes (Reason=BeginTime)."""
        self.scontrol("update", f"JobId={job_id}", "StartTime=now")

    def preempt_once(self, job_id: str, timeout_s: float = 90.0) -> None:
        """Preempt a running job, wait until it was requeued, and let it run again; returns once it does."""
        before = self.restarts(job_id)
        preemptor = self.preempt(job_id)
        self.wait_for_restart(job_id, before + 1, timeout_s=timeout_s)
        self.scancel(preemptor)
        self.wait_for_end(preemptor)
        self.resume(job_id)

    def resume(self, job_id: str, timeout_s: float = 60.0) -> None:
        """Let a requeued job run again; returns once it does."""
        self.wait_for_state(job_id, "PENDING", "RUNNING", timeout_s=timeout_s)
        # On the node it was just taken from, a start in the same second fails ("Job credential revoked", 22.05).
        time.sleep(1.5)
        self.hurry(job_id)
        self.wait_for_state(job_id, "RUNNING", "COMPLETING", *ENDED, timeout_s=timeout_s)

    def kill_node(self, node: str) -> None:
        """SIGKILL a node's slurmd, step daemons and jobs."""
        self._killed.add(node)
        self.run(sys.executable, str(SCRIPT), "kill-node", node)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL a node's slurmd alone: what runs there goes on, and Slurm gives the node up all the same."""
        self._killed.add(node)
        self.run(sys.executable, str(SCRIPT), "kill-slurmd", node)

    def start_node(self, node: str) -> None:
        """Bring a killed node, or its slurmd, back."""
        self.run(sys.executable, str(SCRIPT), "start-node", node, timeout_s=60)
        self._killed.discard(node)

    @contextlib.contextmanager
    def controller_paused(self) -> Iterator[None]:
        """Within, slurmctld answers nobody."""
        self.run(sys.executable, str(SCRIPT), "pause-controller")
        try:
            yield
        finally:
            self.run(sys.executable, str(SCRIPT), "resume-controller")

    # Between tests

    def job_ids(self) -> set[str]:
        """Jobs that are in the queue now."""
        return set(self.squeue("-o", "%A").split())

    def tidy(self, keep: set[str]) -> None:
        """Undo what a test left: its jobs are cancelled, killed nodes are back."""
        left = self.job_ids() - keep
        if left:
            # Unchecked, since a job may end by itself before the call; what counts is that all are gone.
            for how in (["--signal=KILL", "--full"], []):
                subprocess.run(["scancel", *how, *left], env=self.env, capture_output=True, timeout=30)
            self.wait_for(lambda: not self.job_ids() - keep, 60, "cancelled jobs gone")
        for node in sorted(self._killed):
            self.start_node(node)

    def diagnosis(self) -> str:
        """sinfo, squeue, sacct and the end of slurmctld's log."""
        commands: list[Sequence[str]] = [
            ("sinfo", "-N", "-o", "%N %P %T %E"),
            ("squeue", "-o", "%A %j %P %T %r %N %S"),
            ("sacct", "-D", "-X", "-P", "-o", "JobID,JobName,Partition,State,ExitCode,NodeList,Start,End"),
        ]
        parts = []
        for argv in commands:
            done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=20)
            parts.append(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}")
        log = (self.root / "log" / "slurmctld.log").read_text(errors="replace").splitlines()
        return "\n".join([*parts, "--- end of slurmctld.log", *log[-40:]])
