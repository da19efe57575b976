"""The rank processes of one attempt on this machine: started, watched, signalled, and never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfe_hpc.config.run import Plan
from cfe_hpc.ranks.signals import STOP_SIGNALS
from cfe_hpc.runfolder import RunFolder

__all__ = ["LocalRanks", "adopt_orphans", "place_variables"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that `LocalRanks.sweep` finds them."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class LocalRanks:
    """The ranks of one attempt, or the agents of its nodes that start them. Starting them is making one.

    Args:
        argv: what each rank runs.
        cwd: folder the ranks start in.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, *, attempt: int, job_id: str, argv: Sequence[str], cwd: Path
    ) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        common = {"CFE_ATTEMPT": str(attempt), "CFE_JOB_ID": job_id, "CFE_ALLOCATED_S": f"{time.time():.3f}"}
        tasks_per_node = plan.tasks_per_node or plan.devices_per_node
        for task in range(plan.nodes * tasks_per_node):
            environment = {**os.environ, **place_variables(plan.nodes, tasks_per_node, task), **common}
            rank = task if plan.launcher == "srun" else f"node{task}"
            stem = folder.logs / folder.log_stem(job_id=job_id, attempt=attempt, rank=rank)
            self._processes.append(_spawn(argv, environment, cwd, stem))

    def alive(self) -> bool:
        """Whether any rank still runs."""
        return any([process.poll() is None for process in self._processes])

    def failure(self) -> tuple[int, int] | None:
        """(rank, status) of the lowest rank that ended badly: its exit status, or minus the signal that killed it."""
        statuses = enumerate(process.poll() for process in self._processes)
        return next(((rank, status) for rank, status in statuses if status), None)

    def send(self, signum: signal.Signals) -> None:
        """Signal every rank that still runs."""
        for process in self._processes:
            process.send_signal(signum)

    def sweep(self) -> None:
        """Kill what ended ranks have left behind, as a scheduler does after a step, and reap it."""
        while (children := _children()) is not None:
            for pid in children:
                os.kill(pid, signal.SIGKILL)  # ours until reaped: no other process can have the number
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def place_variables(nodes: int, tasks_per_node: int, rank: int) -> Mapping[str, str]:
    """The variables that tell a task where it stands."""
    node_rank, local_rank = divmod(rank, tasks_per_node)
    return {
        "CFE_RANK": str(rank),
        "CFE_LOCAL_RANK": str(local_rank),
        "CFE_WORLD_SIZE": str(nodes * tasks_per_node),
        "CFE_LOCAL_WORLD_SIZE": str(tasks_per_node),
        "CFE_NODE_RANK": str(node_rank),
        "CFE_NUM_NODES": str(nodes),
    }


def _spawn(argv: Sequence[str], environment: Mapping[str, str], cwd: Path, stem: Path) -> subprocess.Popen[bytes]:
    supervisor = os.getpid()

    def before_exec() -> None:
        # Ranks never outlive a supervisor that was killed, not even one killed just now.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:
            os._exit(1)
        # Stop signals wait until the rank can hear them; the supervisor's own waiting ends here.
        signal.pthread_sigmask(signal.SIG_SETMASK, STOP_SIGNALS)

    assert threading.active_count() == 1  # code between fork and exec is safe only so
    with open(f"{stem}.out", "ab") as out, open(f"{stem}.err", "ab") as err:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=dict(environment),
            preexec_fn=before_exec,
        )


def _children() -> list[int] | None:
    """Process ids of all children of this process; None where the kernel does not tell."""
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text(encoding="ascii")
    except OSError:
        return None
    return [int(word) for word in text.split()]
