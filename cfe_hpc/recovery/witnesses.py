"""What others say of a rank's end: srun and slurmstepd in the batch script's log, torchrun in its own."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from cfe_hpc.recovery.logfiles import last_lines, rank_logs
from cfe_hpc.runfolder import RunFolder

__all__ = ["RankEnd", "batch_err_bytes", "batch_lines", "first_end", "lost_node"]

_LINES = 200

# How srun tells of a task that ended badly: its node, its ranks, and how.
_TASK = re.compile(
    r"^srun: error: (?P<host>[^\s:]+): tasks? (?P<first>\d+)[\d,-]*: (?P<how>Exited with exit code \d+|[A-Z].*)$"
)
_NODE = re.compile(r"^srun: error: Node failure on (?P<host>[^\s,\[]+)")

# The end of what torchrun prints when one of its ranks has failed.
_ROOT_CAUSE = "Root Cause (first observed failure):"
_FIELD = re.compile(r"^\s*(?P<name>time|host|rank|exitcode)\s*: (?P<value>.*)$")
_TOLD_TO_END = -15


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How a rank ended, seen from outside."""

    rank: int
    host: str
    how: str


def batch_err_bytes(folder: RunFolder, job_id: str) -> int:
    """How much the log of a job's batch script holds so far: what comes then is of the next attempt."""
    try:
        return (folder.logs / f"{job_id}.batch.err").stat().st_size
    except OSError:
        return 0


def batch_lines(folder: RunFolder, attempt: int) -> list[tuple[Path, str]]:
    """What the batch script's log has of this attempt, oldest line first: srun's and slurmstepd's words."""
    jobs = {path.name.rsplit(".", 3)[0] for path in _logs(folder, attempt)}
    before = [facts for number in range(attempt) if (facts := folder.promised(f"ended-{number}")) is not None]
    found: list[tuple[Path, str]] = []
    for job_id in sorted(jobs):
        path = folder.logs / f"{job_id}.batch.err"
        seen_bytes = max((int(end["batch_err_bytes"]) for end in before if end.get("job_id") == job_id), default=0)
        with contextlib.suppress(OSError):
            found += [(path, line) for line in last_lines(path, _LINES, start=seen_bytes) if line.strip()]
    return found


def _logs(folder: RunFolder, attempt: int) -> list[Path]:
    return [log.path for log in rank_logs(folder, attempt=attempt)] + _agents(folder, attempt)


def _agents(folder: RunFolder, attempt: int) -> list[Path]:
    """The logs of the attempt's agents, one a node, where a launcher starts the ranks."""
    return sorted(folder.logs.glob(f"*.{attempt}.node*.err"))


def first_end(folder: RunFolder, attempt: int, batch: list[tuple[Path, str]]) -> RankEnd | None:
    """The rank that ended badly first, by whoever started the ranks; None when that one says nothing.

    Args:
        batch: `batch_lines` of the attempt.
    """
    agents = _agents(folder, attempt)
    if agents:
        ends = [found for path in agents if (found := _root_cause(path)) is not None]
        return min(ends, key=lambda each: each[0])[1] if ends else None
    for _, line in batch:
        match = _TASK.match(line)
        if match is not None:
            how = match["how"][0].lower() + match["how"][1:]
            return RankEnd(rank=int(match["first"]), host=match["host"], how=how)
    return None


def _root_cause(path: Path) -> tuple[tuple[bool, str], RankEnd] | None:
    """((it was told to end, time), its end) of the rank that torchrun on one node saw fail first."""
    try:
        lines = last_lines(path, _LINES)
    except OSError:
        return None
    if _ROOT_CAUSE not in lines:
        return None
    after = lines[len(lines) - lines[::-1].index(_ROOT_CAUSE) :]
    fields = {match["name"]: match["value"].split() for line in after if (match := _FIELD.match(line)) is not None}
    try:
        rank, code = int(fields["rank"][0]), int(fields["exitcode"][0])
        host, time = fields["host"][0], fields["time"][0]
    except (KeyError, IndexError, ValueError):  # a torchrun that words it otherwise
        return None
    how = f"exited with exit code {code}" if code >= 0 else f"killed by {fields['exitcode'][-1].strip('()')}"
    return (code == _TOLD_TO_END, time), RankEnd(rank=rank, host=host, how=how)


def lost_node(batch: list[tuple[Path, str]]) -> tuple[str, Path, str] | None:
    """(node, log, line) where srun says that it has lost a node."""
    for path, line in batch:
        match = _NODE.match(line)
        if match is not None:
            return match["host"], path, line
    return None
