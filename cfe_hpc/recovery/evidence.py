"""Why an attempt failed, put together from what its ranks said, what Slurm and the kernel printed, and how it ended.

Ranks whose peer is gone report errors of their own, often before anybody says a word of the first one: "connection
closed by peer" on all ranks but one is the echo of the one that was killed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfe_hpc.process import CommandError, run
from cfe_hpc.recovery.attempts import KILLED, cause_of
from cfe_hpc.recovery.causes import Cause, of_text, row
from cfe_hpc.recovery.logfiles import last_lines, rank_logs
from cfe_hpc.recovery.witnesses import RankEnd, batch_lines, first_end, lost_node
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["Fault", "find", "first_word", "oom_kills", "slurm_end"]

_SACCT_TIMEOUT_S = 10.0
_LINES = 200
_LAST_LINES = 50
_MAX_LINE = 300
_RANKS = 64
"""Ranks whose logs are read where nobody says which one it was."""

# Words of who saw a rank end, not of the rank itself: its log may say more. One that was killed by SIGKILL had no time.
_SEEN_FROM_OUTSIDE = re.compile(
    r"^exit status \d+$|SIGABRT|aborted|(ended|exited) with (status|exit code) \d+|ended without a result",
    re.IGNORECASE,
)


_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)(?::|$)")
_STEP = re.compile(r"^slurmstepd(?:-(?P<host>\S+))?: error: .*[Ee]xceeded (?:job |step )?memory limit")
# What the agent of a launcher says of all its ranks at once.
_LAUNCHER = re.compile(r"^(torchrun|deepspeed): exit status \d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why an attempt failed.

    Attributes:
        why: the first error's own words, or a sentence of evidence.
        rank, host: where it began; None when nobody knows, or it is of no single one.
        time_s: epoch seconds by the clock of the preflight's first node; None when nobody said.
        log: path of the log that shows it, within the run folder; None when there is none.
        line: the line of that log that says why.
    """

    cause: Cause
    why: str
    rank: int | None = None
    host: str | None = None
    time_s: float | None = None
    log: str | None = None
    line: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A `failed` event."""

    cause: Cause
    event: dict[str, Any]
    time_s: float
    killed: bool


class _Logs:
    """The standard error of an attempt's ranks. The folder is listed once: it may hold thousands of files."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self._paths: dict[int, list[Path]] = {}
        for log in rank_logs(folder, attempt=attempt):
            if log.stream == "err":
                self._paths.setdefault(log.rank, []).append(log.path)

    @property
    def ranks(self) -> list[int]:
        return sorted(self._paths)

    def tail(self, rank: int | None, count: int) -> list[tuple[Path, str]]:
        """The last lines of a rank's that are not blank, the newest first."""
        found: list[tuple[Path, str]] = []
        for path in self._paths.get(rank, []) if rank is not None else []:
            with contextlib.suppress(OSError):
                found += [(path, line) for line in last_lines(path, count) if line.strip()]
        return found[::-1]

    def speak(self, rank: int, why: str) -> tuple[Cause, str]:
        """(cause, words) of a rank of which only the end was seen: what the last lines of its log tell, if anything."""
        lines = self.tail(rank, _LAST_LINES) if _SEEN_FROM_OUTSIDE.search(why) else []
        spoken: list[tuple[Cause, str]] = [(cause, line) for _, line in lines if (cause := of_text(line)) != "failed"]
        spoken += [("failed", line) for _, line in lines if _EXCEPTION.match(line)]
        if not spoken:
            return "failed", why
        # What a broken connection makes a program print on its way out comes last, and says less.
        cause, line = min(spoken, key=lambda each: (each[0] == "failed", row(each[0]).symptom))
        return cause, f"{why}: {line.strip()[:_MAX_LINE]}"

    def with_line(self, fault: Fault) -> Fault:
        """The fault with the line of its rank's log that says why."""
        lines = self.tail(fault.rank, _LINES)
        if not lines:
            return fault
        ways: tuple[Callable[[str], bool], ...] = (
            lambda line: fault.why in line,
            lambda line: fault.cause != "failed" and of_text(line) == fault.cause,
            lambda line: of_text(line) != "failed",
            lambda line: True,
        )
        path, line = next(found for fits in ways for found in lines if fits(found[1]))
        return replace(fault, log=f"logs/{path.name}", line=line.strip()[:_MAX_LINE])


def find(folder: RunFolder, *, attempt: int, restart: int = 0, status: int | None = None, oom_kills: int = 0) -> Fault:
    """Why an attempt failed, as far as anything tells.

    In this order: an error whose cause is known; word of a lack of memory, or of a dead node, from Slurm or the
    kernel; an error of the job's own; a rank that died without a word; an error that may be the echo of another
    one; the exit status.

    Args:
        restart: looks only at what came after this restart inside the allocation.
        status: the ranks' exit status; None or 0 when there is none that tells anything.
        oom_kills: processes that the kernel has killed in the attempt's memory cgroup.
    """
    logs, batch = _Logs(folder, attempt), batch_lines(folder, attempt)
    failures = [_refined(logs, each) for each in _failures(folder.events(), attempt, restart)]
    first = next((each for each in failures if not row(each.cause).symptom), None)
    if first is not None and first.cause != "failed":
        return logs.with_line(_told(first))
    silent = _silent(logs, first_end(folder, attempt, batch), failures)
    fault = _out_of_memory(batch, first, silent, oom_kills=oom_kills) or _dead_node(batch)
    if fault is not None:
        return fault
    if first is not None:
        return logs.with_line(_told(first))
    if silent is not None:
        return logs.with_line(silent)
    if failures:
        return logs.with_line(_told(failures[0]))
    return _by_status(logs, status)


def first_word(events: Iterable[dict[str, Any]], *, attempt: int) -> dict[str, Any] | None:
    """The `failed` event of an attempt that tells why it failed; None when it has none."""
    events = list(events)
    failures = _failures(events, attempt, 0)
    first = next((each for each in failures if not row(each.cause).symptom), next(iter(failures), None))
    if first is not None:
        return first.event
    return next((each for each in events if (each.get("event"), each.get("attempt")) == ("failed", attempt)), None)


def oom_kills(*, job_id: str | None = None) -> int | None:
    """Processes that the kernel has killed for want of memory in this process's memory cgroup, since that was made.

    Args:
        job_id: in the cgroup of this Slurm job instead, steps included where the kernel counts them there (version 2).

    Returns:
        None when there is no such cgroup, or no count.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: list[int] = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            root, name = "/sys/fs/cgroup", "memory.events"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.oom_control"
        else:
            continue
        own = Path(f"{root}{inside}")
        folders = [own] if job_id is None else [each for each in (own, *own.parents) if each.name == f"job_{job_id}"]
        found += [count for each in folders if (count := _count(each / name)) is not None]
    return max(found, default=None)


def _count(path: Path) -> int | None:
    try:
        words = path.read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else None


def slurm_end(job_id: str) -> tuple[str, float | None] | None:
    """(state, epoch seconds of the end) of the newest attempt of a job that has ended, as sacct tells; None where
    sacct is missing, gives no answer, or knows of none."""
    argv = ["sacct", "-D", "-X", "-n", "-P", "-j", job_id, "-o", "State,End"]
    try:
        shown = run(argv, timeout_s=_SACCT_TIMEOUT_S).stdout
    except CommandError:
        return None
    ended: list[tuple[str, float | None]] = []
    for line in shown.splitlines():
        state, _, stamp = line.partition("|")
        end_s = epoch_s(stamp.strip())
        if end_s is not None:  # "Unknown" while it runs
            ended.append((state.split()[0], end_s))
    return ended[-1] if ended else None


def _failures(events: Iterable[dict[str, Any]], attempt: int, restart: int) -> list[_Failure]:
    """The attempt's `failed` events, by the time at which they happened, clocks set right as its preflight found."""
    events = [event for event in events if event.get("attempt") == attempt]
    if restart:
        begins = [index for index, event in enumerate(events) if _detail(event).get("restart") == restart]
        events = events[begins[0] :] if begins else events
    skew_s = _skews(events)
    found = []
    for event in events:
        if event.get("event") == "failed" and not _LAUNCHER.match(str(event.get("reason"))):
            time_s = (epoch_s(event.get("time")) or 0.0) - skew_s.get(str(event.get("host")), 0.0)
            killed = event.get("detail") == KILLED
            found.append(_Failure(cause=cause_of(event), event=event, time_s=time_s, killed=killed))
    return sorted(found, key=lambda each: each.time_s)


def _detail(event: dict[str, Any]) -> dict[str, Any]:
    detail = event.get("detail")
    return detail if isinstance(detail, dict) else {}


def _skews(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    skews: dict[str, float] = {}
    for event in events:
        preflight = _detail(event).get("preflight")
        nodes = preflight.get("nodes") if isinstance(preflight, dict) else None
        for node in nodes if isinstance(nodes, list) else []:
            if isinstance(node, dict) and isinstance(node.get("skew_s"), (int, float)):
                skews[str(node.get("host"))] = float(node["skew_s"])
    return skews


def _refined(logs: _Logs, failure: _Failure) -> _Failure:
    """The failure, its cause read from its rank's log where the event tells no more than how the rank ended."""
    reason, rank = str(failure.event.get("reason", "")), failure.event.get("rank")
    if failure.cause != "failed" or "cause" in failure.event or rank is None:
        return failure
    cause, why = logs.speak(rank, reason)
    return (
        failure
        if why == reason
        else replace(failure, cause=cause, event={**failure.event, "reason": why}, killed=False)
    )


def _silent(logs: _Logs, end: RankEnd | None, failures: list[_Failure]) -> Fault | None:
    """The rank that ended first, when it said nothing: those that are ended because of it come later."""
    if end is None or any(each.event.get("rank") == end.rank for each in failures):
        return None
    cause, why = logs.speak(end.rank, f"rank {end.rank}: {end.how}")
    return Fault(cause=cause, why=why, rank=end.rank, host=end.host)


def _out_of_memory(
    batch: list[tuple[Path, str]], first: _Failure | None, silent: Fault | None, *, oom_kills: int
) -> Fault | None:
    path, line = next(((path, line) for path, line in batch if of_text(line) == "oom_host"), (None, None))
    if line is not None:
        said = line[:_MAX_LINE]
    elif oom_kills and (first is None or first.killed):
        said = f"the kernel has killed {oom_kills} of its processes"
    else:
        return None
    rank, host = _who_took_it(line or "", first, silent)
    return Fault(
        cause="oom_host",
        why=f"{'the job' if rank is None else f'rank {rank}'} was out of memory: {said}",
        rank=rank,
        host=host,
        log=None if path is None else f"logs/{path.name}",
        line=None if line is None else said,
    )


def _who_took_it(line: str, first: _Failure | None, silent: Fault | None) -> tuple[int | None, str | None]:
    """(rank, host) that ran out of memory. Where slurmstepd has done the counting it ends all ranks of its node."""
    step = _STEP.match(line)
    if step is not None:
        return None, step["host"]
    if silent is not None:
        return silent.rank, silent.host
    return (None, None) if first is None else (first.event.get("rank"), first.event.get("host"))


def _dead_node(batch: list[tuple[Path, str]]) -> Fault | None:
    lost = lost_node(batch)
    if lost is None:
        return None
    host, path, line = lost
    why = f"node {host} failed: {line[:_MAX_LINE]}"
    return Fault(cause="node_failure", why=why, host=host, log=f"logs/{path.name}", line=line[:_MAX_LINE])


def _told(failure: _Failure) -> Fault:
    event = failure.event
    return Fault(
        cause=failure.cause,
        why=str(event.get("reason", "no reason given")),
        rank=event.get("rank"),
        host=event.get("host"),
        time_s=failure.time_s,
    )


def _by_status(logs: _Logs, status: int | None) -> Fault:
    """What the status tells, or else the logs of the ranks: nobody says which one it was."""
    why = f"the ranks ended {f'with status {status}' if status else 'without a result'}"
    if status in (126, 127):
        return Fault(cause="configuration", why=why)
    found = [(rank, *logs.speak(rank, why)) for rank in logs.ranks[:_RANKS]]
    if not found:
        return Fault(cause="failed", why=why)
    rank, cause, words = min(found, key=lambda each: (each[1] == "failed", row(each[1]).symptom))
    named = cause != "failed" or len(logs.ranks) == 1
    return logs.with_line(Fault(cause=cause, why=words if named else why, rank=rank if named else None))
