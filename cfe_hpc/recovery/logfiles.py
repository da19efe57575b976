"""The log files of a run's ranks: which there are, and what their last lines say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cfe_hpc.runfolder import RunFolder

__all__ = ["RankLog", "last_lines", "line_text", "rank_logs"]

_NAME = re.compile(r"^(?P<job>.+)\.(?P<attempt>\d+)\.(?P<rank>\d+)\.(?P<stream>out|err)$")
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class RankLog:
    """One file of one rank's one attempt; sorts by attempt, rank, then out before err."""

    attempt: int
    rank: int
    stream: Literal["out", "err"]
    path: Path

    @property
    def label(self) -> str:
        """`0.12` for attempt 0, rank 12; `0.12!` for its standard error."""
        return f"{self.attempt}.{self.rank}{'!' if self.stream == 'err' else ''}"


def rank_logs(folder: RunFolder, *, rank: int | None = None, attempt: int | None = None) -> list[RankLog]:
    """The ranks' log files there are now, oldest attempt first; those of one rank or one attempt when given."""
    found = []
    for path in folder.logs.glob("*.*.*.*"):
        match = _NAME.match(path.name)
        if match is None:
            continue
        stream: Literal["out", "err"] = "err" if match["stream"] == "err" else "out"
        log = RankLog(int(match["attempt"]), int(match["rank"]), stream, path)
        if rank in (None, log.rank) and attempt in (None, log.attempt):
            found.append(log)
    return sorted(found, key=lambda log: (log.attempt, log.rank, log.stream == "err", log.path))


def line_text(line: bytes) -> str:
    """A line for a terminal: a progress bar's carriage returns leave its last state only."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", errors="replace")


def last_lines(path: Path, count: int, *, start: int = 0) -> list[str]:
    """The last lines of a file, of those from byte `start` on; only its end is read.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    with open(path, "rb") as stream:
        stream.seek(max(start, stream.seek(0, 2) - _TAIL_BYTES))
        return [line_text(line) for line in stream.read().splitlines()[-count:]]
