"""Why an attempt ended: the one table of causes, and how exceptions and lines of logs are told apart by it.

Some causes are read from the scheduler's record alone (a preemption leaves no error behind), others from what a rank
raised or printed. What follows from a cause is decided by its row, too: which budget it spends, and whether the same
error twice is a reason to stop. Nothing of torch is imported: its errors are known by their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

__all__ = ["CAUSES", "Cause", "Row", "of_exception", "of_text", "row"]

Cause = Literal[
    "preempted",
    "time_limit",
    "requeue_requested",
    "node_failure",
    "node_unfit",
    "cancelled",
    "oom_host",
    "oom_device",
    "nan",
    "hang",
    "communication",
    "data",
    "disk_full",
    "configuration",
    "failed",
]
"""`failed` is any error that no other row knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cause.

    Attributes:
        word: what it is called in sentences.
        budget: key of `[recovery]` that says how often another attempt follows; None when nothing is counted.
        spent: what becomes of the run when the budget is spent.
        retried: whether another attempt follows: always, as long as the budget lasts, or never.
        same_error_holds: two attempts with the same first error hold the run, whatever is left of the budget.
        types: qualified names of exceptions; their subclasses count, too.
        pattern: searched for in "Type: message" and in lines of logs; "" is found nowhere.
        symptom: may follow from an error of another rank, which is then the cause.
    """

    cause: Cause
    word: str
    budget: str | None = None
    spent: Literal["hold", "fail"] = "hold"
    retried: Literal["always", "budget", "never"] = "budget"
    same_error_holds: bool = False
    types: frozenset[str] = frozenset()
    pattern: str = ""
    symptom: bool = False


def _any(*patterns: str) -> str:
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _raised(*names: str) -> str:
    """A line that a traceback, torch's (which names the rank) or an event ends with."""
    return rf"^(?:\[rank\d+\]: )?(?:\w+\.)*(?:{'|'.join(names)})(?::|$)"


def _ours(*names: str) -> frozenset[str]:
    return frozenset(f"cfe_hpc.errors.{name}" for name in names)


# Texts marked "seen" stand in tests/captured/errors.txt. Most are from logs, here or in public reports; those of Gaudi,
# cuBLAS and OverMemoryKill are as their documentation has them, and wait for a log. Numbers of errors are Linux's.

_DEVICE_MEMORY = _any(
    r"\b(?:CUDA|HIP|HPU|XPU) out of memory\b",  # torch's allocator; seen
    r"CUDA error: out of memory",  # seen
    r"Cuda failure (?:2 )?'out of memory'",  # NCCL; seen
    r"Failed to CUDA (?:calloc|malloc|host alloc)",  # NCCL
    r"CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS has no workspace; seen
    r"DefaultCPUAllocator: can't allocate memory",  # on cpu the host is the device; seen
    r"DefaultCPUAllocator: not enough memory",
    r"PT_DEVMEM.*Allocation failed",  # Gaudi; seen
    r"synOutOfDeviceMemory|synFailedToAllocateDeviceMemory",
)
_HOST_MEMORY = _any(
    _raised("MemoryError", "_ArrayMemoryError"),
    r"\[Errno 12\]|Cannot allocate memory",
    r"std::bad_alloc",
    r"\boom[-_]kill event|OOM Killed",  # slurmstepd, both spellings of its versions; seen
    r"cgroup out-of-memory handler",  # slurmstepd before 20.11; seen
    r"srun: error: .*: Out Of Memory",  # seen
    r"[Ee]xceeded (?:job |step )?memory limit",  # OverMemoryKill; seen
    r"Out of memory: Killed process|Memory cgroup out of memory",  # the kernel; seen
    r"\bOUT_OF_MEMORY\b",  # sacct
    r"is killed by signal: Killed",  # a worker of torch's DataLoader; seen
)
_DISK = _any(
    r"\[Errno (?:28|122)\]",
    r"No space left on device",  # seen
    r"Disk quota exceeded",  # seen
    _raised("DiskFull"),
)
_HANG = _any(
    r"[Cc]ollective operation timeout",  # NCCL's watchdog; seen
    r"watchdog got stuck for \d+ seconds",  # torch's monitor of that watchdog; seen
    r"Timed out waiting \d+ms for (?:recv|send) operation",  # gloo; seen
    r"failed to pass monitoredBarrier in \d+ ms",
    r"\bno step for \d",  # cfe_hpc's watchdog
)
_CONFIGURATION = _any(
    _raised("ConfigError", "UsageError", "ImpossibleError", "CheckpointMismatch"),
    _raised("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "TabError"),
    r"\b\d+ validation errors? for ",  # pydantic
    r"\bexit status 12[67]\b",
)
_COMMUNICATION = _any(
    r"\[Errno (?:32|103|104|107|110|111|112|113)\]",
    r"Connection reset by peer|Connection refused|Broken pipe|No route to host",  # seen
    r"\bgloo/.*(?:closed by peer|Read error|Write error|Socket closed|connect|Connection)",  # seen
    r"Gloo connectFullMesh failed",
    r"NCCL error in:|\bnccl(?:System|Remote|Internal|UnhandledCuda)Error\b",  # seen
    r"NCCL communicator was aborted",  # seen
    r"remote process exited or there was a network error",  # NCCL; seen
    r"Connection closed by (?:remote )?peer",  # seen
    r"\bHCCL\b.*(?:[Ee]rror|fail)|\bhccl\w*(?:Error|Fail)|PT_DISTRIBUTED",
    r"\bDist(?:Backend|Network|Store)?Error\b",  # torch.distributed; seen
    r"client socket has timed out|failed to connect to any network address",  # c10d; seen
    r"wait timeout after \d+ms, keys:",  # TCPStore; seen
    r"found no rank 0 on",  # ranks.rendezvous
)

CAUSES: tuple[Row, ...] = (
    Row(cause="preempted", word="preemption", budget="preemptions"),
    Row(cause="time_limit", word="time limit", budget="timeouts"),
    Row(cause="requeue_requested", word="requeue asked for", retried="always"),
    Row(cause="cancelled", word="cancel", spent="fail", retried="never"),
    Row(cause="node_failure", word="node failure", budget="node_failures"),
    Row(
        cause="node_unfit",
        word="unfit node",
        budget="node_failures",
        types=_ours("NodeUnfit"),
        pattern=_raised("NodeUnfit"),
    ),
    Row(
        cause="oom_device",
        word="device out of memory",
        budget="device_ooms",
        types=frozenset({"torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}),
        pattern=_DEVICE_MEMORY,
    ),
    Row(
        cause="oom_host",
        word="host out of memory",
        budget="host_ooms",
        same_error_holds=True,
        types=frozenset({"builtins.MemoryError"}),
        pattern=_HOST_MEMORY,
    ),
    Row(
        cause="nan",
        word="value that is not finite",
        budget="nans",
        types=_ours("NonFinite"),
        pattern=_raised("NonFinite"),
    ),
    Row(cause="disk_full", word="full disk", budget="disk_fulls", types=_ours("DiskFull"), pattern=_DISK),
    Row(cause="hang", word="hang", budget="hangs", pattern=_HANG),
    Row(
        cause="data",
        word="data error",
        budget="failures",
        spent="fail",
        same_error_holds=True,
        types=_ours("DataError"),
        pattern=_raised("DataError"),
    ),
    Row(
        cause="configuration",
        word="configuration error",
        spent="fail",
        retried="never",
        types=_ours("ConfigError", "UsageError", "ImpossibleError", "CheckpointMismatch")
        | {"builtins.ImportError", "builtins.SyntaxError", "pydantic_core._pydantic_core.ValidationError"},
        pattern=_CONFIGURATION,
    ),
    Row(
        cause="communication",
        word="communication error",
        budget="communication_errors",
        types=frozenset({"builtins.ConnectionError", "torch.distributed.DistError"}),
        pattern=_COMMUNICATION,
        symptom=True,
    ),
    Row(cause="failed", word="failure", budget="failures", spent="fail", same_error_holds=True),
)
"""The first row that fits counts: memory before communication, for NCCL wraps the one into the other."""


def row(cause: Cause) -> Row:
    """The row of a cause."""
    return next(each for each in CAUSES if each.cause == cause)


def of_text(text: str) -> Cause:
    """The cause that a line of a log, or several, speaks of; `failed` when no row knows it."""
    return next((each.cause for each in CAUSES if _speaks_of(each, text)), "failed")


def of_exception(error: BaseException) -> Cause:
    """The cause that an exception speaks of, or else one that it came from.

    `raise … from error` is followed always. An error that was merely being handled meanwhile is one only behind a
    symptom: a collective that breaks in the `finally` of a rank that ran out of memory. Elsewhere it was the fallback
    that failed, not what it replaced.
    """
    found: list[Cause] = []
    for each in _chain(error):
        cause = _of_one(each)
        if cause != "failed" and not row(cause).symptom:
            return cause
        found.append(cause)
    return next((cause for cause in found if cause != "failed"), "failed")


def _of_one(error: BaseException) -> Cause:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    text = f"{type(error).__name__}: {error}"
    return next((each.cause for each in CAUSES if names & each.types or _speaks_of(each, text)), "failed")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those it came from, newest first, each once (a cycle is possible)."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        hides = not here.__suppress_context__ and row(_of_one(here)).symptom
        here = here.__cause__ or (here.__context__ if hides else None)


def _speaks_of(each: Row, text: str) -> bool:
    return bool(each.pattern) and _compiled(each.pattern).search(text) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)
