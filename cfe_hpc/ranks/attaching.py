"""`python -m cfe_hpc.ranks.attaching RUN_DIR --rank N`: a shell beside a rank that runs on this node, in its very
environment. The rank itself is left alone."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError, RunFailed
from cfe_hpc.process import start_ticks
from cfe_hpc.ranks.bootstrap import rank_variables
from cfe_hpc.ranks.debugging import interactive_shell
from cfe_hpc.ranks.env import RankFacts, read_facts
from cfe_hpc.runfolder import RunFolder

__all__ = ["RankProcess", "main", "rank_process"]

_PROC = Path("/proc")

_ATTACHED = "CFE_ATTACHED"
"""Marks a shell of ours, which has a rank's environment without being one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """A process of a rank, and the environment it was started with."""

    pid: int
    environment: Mapping[str, str]
    facts: RankFacts


def rank_process(folder: RunFolder, rank: int, *, node: str | None = None) -> RankProcess | None:
    """The process of `rank` on this node: the program of a `command` job, else the rank's own; None without one.

    Args:
        node: Slurm's name of this node, where several may be on one machine.
    """
    found = [process for process in _processes(folder.run_id, node) if process.facts.rank == rank]
    programs = [process for process in found if "RANK" in process.environment]
    # The oldest: workers and writers of checkpoints are its children, in the same environment.
    return min(programs or found, key=lambda process: start_ticks(process.pid) or math.inf, default=None)


def _processes(run_id: str, node: str | None) -> Iterator[RankProcess]:
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            pairs = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        environment = {os.fsdecode(name): os.fsdecode(value) for name, _, value in (p.partition(b"=") for p in pairs)}
        # By the run's id: the folder may have been reached by another path.
        ours = RunFolder(Path(environment.get("CFE_RUN_DIR", ""))).run_id == run_id
        here = node is None or environment.get("SLURMD_NODENAME") == node
        is_rank = b"cfe_hpc.ranks" in words or b"cfe_hpc.ranks.debugging" in words or "RANK" in environment
        if ours and here and is_rank and _ATTACHED not in environment:
            yield RankProcess(pid=int(entry.name), environment=environment, facts=read_facts(environment))


def main(argv: Sequence[str] | None = None) -> int:
    """The module's command line; the shell's status."""
    parser = argparse.ArgumentParser(prog="cfe_hpc.ranks.attaching", description="A shell beside a running rank.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    args = parser.parse_args(argv)
    folder = RunFolder(args.run_dir)
    try:
        return _attach(folder, args.rank)
    except CfeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _attach(folder: RunFolder, rank: int) -> int:
    spec = RunSpec.read(folder.run_toml)
    node = os.environ.get("SLURMD_NODENAME")
    process = rank_process(folder, rank, node=node)
    if process is None:
        raise RunFailed(f"{folder.run_id}: rank {rank} has no process on this node; look into `cfe-hpc logs` for it")
    os.chdir(spec.provenance.start_folder)
    environment = {**os.environ, **rank_variables(process.facts), **process.environment, _ATTACHED: "1"}
    if spec.job.environment.container.kind != "none":  # its programs are not out here
        environment.update({name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ})
    print(f"cfe_hpc: rank {rank} of {process.facts.world_size} is process {process.pid} here", file=sys.stderr)
    for line in _advice(process.pid):
        print(f"cfe_hpc: {line}", file=sys.stderr)
    return interactive_shell(environment, name=f"{spec.job.name} {rank}/{process.facts.world_size}")


def _advice(pid: int) -> Iterator[str]:
    """What shows where the rank is, of what is installed here."""
    if shutil.which("py-spy"):
        yield f"`py-spy dump --pid {pid}` shows where it is"
    if sys.version_info >= (3, 14):
        yield f"`{sys.executable} -m pdb -p {pid}` stops it in the debugger; its peers wait meanwhile"
    yield "`exit` leaves it running"


if __name__ == "__main__":
    sys.exit(main())
