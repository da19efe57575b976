"""What a process knows of its place among the ranks, read from the environment alone."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cfe_hpc.errors import UsageError
from cfe_hpc.ranks.nodelist import expand

__all__ = ["RankFacts", "read_facts", "slurm_job_id"]


Scheduler = Literal["slurm", "local", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """One process's place.

    Attributes:
        scheduler: who started the attempt: "slurm", our own "local" supervisor, or "none" (a script run by hand,
            also under torchrun, and a debug session).
        rank: global rank, 0 to world_size - 1.
        local_rank: rank on this node; also the index of its device among those the job was given here.
        hosts: the node names of the attempt, in the order of node_rank.
        job_id: the scheduler's; "alone-…" without one.
        attempt: 0, 1, 2 …: allocations of the run so far, this one not counted.
        restart: times that a launcher has started the ranks again in this allocation.
    """

    scheduler: Scheduler
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    hosts: tuple[str, ...]
    job_id: str
    attempt: int
    restart: int = 0


def read_facts(environ: Mapping[str, str] | None = None) -> RankFacts:
    """The facts of this process, from CFE_* (the supervisor's, or a launcher's shim's), srun's SLURM_*, torchrun's
    RANK …, or a single rank.

    Raises:
        UsageError: a variable that must be a number is not.
    """
    env = os.environ if environ is None else environ
    if "CFE_RANK" in env:
        return _from_supervisor(env)
    # SLURM_PROCID alone also stands in a batch shell and in `salloc`: only srun sets the step's.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_STEP_ID") not in ("4294967291", "batch"):
        return _from_srun(env)
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    host = socket.gethostname()
    return RankFacts(
        scheduler="none",
        rank=0,
        local_rank=0,
        world_size=1,
        local_world_size=1,
        node_rank=0,
        num_nodes=1,
        hosts=(host,),
        job_id=f"alone-{os.getpid()}",
        attempt=_number(env, "CFE_ATTEMPT_BASE", 0),
    )


def slurm_job_id(environ: Mapping[str, str]) -> str:
    """This job as Slurm's commands take it; "" outside of one. A task of an array is `<array>_<index>`: its own number
    may be the array's, and a command would then mean all tasks."""
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else environ.get("SLURM_JOB_ID", "")


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UsageError(
            f"environment: {name}: not a whole number ({text}); start ranks through srun or submit"
        ) from None


def _scheduler(env: Mapping[str, str], *, started_by: Scheduler) -> Scheduler:
    """Who starts the next attempt: who has started this one, unless a launcher in between or `debug` says otherwise."""
    known: dict[str | None, Scheduler] = {"slurm": "slurm", "none": "none"}
    return known.get(env.get("CFE_SCHEDULER"), started_by)


def _from_supervisor(env: Mapping[str, str]) -> RankFacts:
    num_nodes = _number(env, "CFE_NUM_NODES", 1)
    hosts = env.get("CFE_HOSTS")
    return RankFacts(
        scheduler=_scheduler(env, started_by="local"),
        rank=_number(env, "CFE_RANK"),
        local_rank=_number(env, "CFE_LOCAL_RANK"),
        world_size=_number(env, "CFE_WORLD_SIZE"),
        local_world_size=_number(env, "CFE_LOCAL_WORLD_SIZE"),
        node_rank=_number(env, "CFE_NODE_RANK", 0),
        num_nodes=num_nodes,
        hosts=tuple(hosts.split(",")) if hosts else ("localhost",) * num_nodes,
        job_id=env.get("CFE_JOB_ID", "local"),
        attempt=_number(env, "CFE_ATTEMPT", 0),
        restart=_number(env, "CFE_RESTART", 0),
    )


def _from_srun(env: Mapping[str, str]) -> RankFacts:
    hosts = tuple(expand(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or socket.gethostname()))
    node_rank = _number(env, "SLURM_NODEID", 0)
    world_size = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)
    tasks = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    return RankFacts(
        scheduler=_scheduler(env, started_by="slurm"),
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=tasks[node_rank] if node_rank < len(tasks) else world_size // len(hosts),
        node_rank=node_rank,
        num_nodes=len(hosts),
        hosts=hosts,
        job_id=slurm_job_id(env),
        attempt=_number(env, "CFE_ATTEMPT_BASE", 0) + _number(env, "SLURM_RESTART_COUNT", 0),
    )


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's "4(x2),3" as [4, 4, 3]."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def _from_torchrun(env: Mapping[str, str]) -> RankFacts:
    world_size = _number(env, "WORLD_SIZE")
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", world_size)
    rank = _number(env, "RANK")
    num_nodes = max(1, world_size // max(1, local_world_size))
    return RankFacts(
        scheduler="none",
        rank=rank,
        local_rank=_number(env, "LOCAL_RANK", rank),
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=_number(env, "GROUP_RANK", rank // max(1, local_world_size)),
        num_nodes=num_nodes,
        hosts=(env.get("MASTER_ADDR", "localhost"),) * num_nodes,
        job_id=f"alone-{env.get('MASTER_PORT', '0')}",
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
    )
