"""`python -m cfe_hpc.ranks.poke RUN_DIR SIGNAL`: signal what the scheduler's own daemon on this node would.

Under proctrack/cgroup a stop reaches the direct children of slurmstepd alone; under linuxproc every process of the
step hears it. This signals the former on any of them, so that a drill can show whether they pass it on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["children_of_daemons", "main", "poke"]

_PROC = Path("/proc")
_DAEMON = "slurmstepd"


def poke(pids: Sequence[int], signame: str) -> None:
    """CONT and the signal to each process, as Slurm has it. Those that are gone are passed over."""
    for pid in pids:
        for signum in (signal.SIGCONT, signal.Signals[f"SIG{signame}"]):
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                break


def children_of_daemons(run_dir: Path, *, supervisor: int | None = None) -> Iterator[int]:
    """The tasks of the run's attempt on this node: direct children of slurmstepd, or of our own supervisor, that were
    started for this run.

    Args:
        supervisor: the process id of the run's supervisor, on a machine without a scheduler.
    """
    node = os.environ.get("SLURMD_NODENAME")
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = _environment(entry)
            parent = _parent(entry)
            daemon = parent == supervisor if supervisor is not None else _name(_PROC / str(parent)) == _DAEMON
        except OSError:  # gone, or another user's
            continue
        here = supervisor is not None or environment.get("SLURMD_NODENAME") == node
        # By the run's id: the folder may have been reached by another path.
        if daemon and here and Path(environment.get("CFE_RUN_DIR", "")).name == run_dir.name:
            yield int(entry.name)


def _environment(process: Path) -> dict[str, str]:
    pairs = (process / "environ").read_bytes().split(b"\0")
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in (pair.partition(b"=") for pair in pairs)}


def _parent(process: Path) -> int:
    stat = (process / "stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything


def _name(process: Path) -> str:
    return (process / "comm").read_text(encoding="utf-8", errors="replace").strip()


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line: 1 when there is nothing to signal."""
    run_dir, signame = sys.argv[1:] if argv is None else argv
    pids = list(children_of_daemons(Path(run_dir)))
    poke(pids, signame)
    print(f"{os.environ.get('SLURMD_NODENAME', 'here')}: {signame} to {len(pids)} processes")
    return 0 if pids else 1


if __name__ == "__main__":
    sys.exit(main())
