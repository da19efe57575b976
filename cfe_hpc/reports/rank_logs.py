"""The logs of a run's ranks: which files there are, what is new in them, and which rank failed first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.runfolder import RunFolder

__all__ = ["Follower", "RankLog", "first_failure", "last_lines", "rank_logs"]

_NAME = re.compile(r"^(?P<job>.+)\.(?P<attempt>\d+)\.(?P<rank>\d+)\.(?P<stream>out|err)$")
_CHUNK_BYTES = 1 << 20


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


class Follower:
    """Reads log files as they grow, new files of new attempts too."""

    def __init__(self, folder: RunFolder, *, rank: int | None = None, attempt: int | None = None) -> None:
        self._folder, self._rank, self._attempt = folder, rank, attempt
        self._read: dict[Path, int] = {}
        self._partial: dict[Path, bytes] = {}

    def news(self, *, whole: bool = False) -> Iterator[tuple[RankLog, str]]:
        """Lines written since the last call, file by file, without their line ends.

        Args:
            whole: nothing more will come: give a last line that lacks its end too.
        """
        for log in rank_logs(self._folder, rank=self._rank, attempt=self._attempt):
            for line in self._lines(log.path):
                yield log, line
            rest = self._partial.pop(log.path, b"") if whole else b""
            if rest:
                yield log, _text(rest)

    def _lines(self, path: Path) -> Iterator[str]:
        with open(path, "rb") as stream:
            stream.seek(self._read.get(path, 0))
            while chunk := stream.read(_CHUNK_BYTES):
                self._read[path] = stream.tell()
                *lines, rest = (self._partial.pop(path, b"") + chunk).split(b"\n")
                if rest:
                    self._partial[path] = rest
                yield from map(_text, lines)


def _text(line: bytes) -> str:
    """A line for a terminal: a progress bar's carriage returns leave its last state only."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", errors="replace")


def first_failure(folder: RunFolder, *, attempt: int | None = None) -> dict[str, Any] | None:
    """The first `failed` event of the newest attempt that has one, or of the given attempt; None when there is none.

    Ranks whose peer has died report errors of their own a moment later: the first event is the cause.
    """
    failures: dict[int, dict[str, Any]] = {}
    for event in folder.events():
        number = event.get("attempt")
        if event.get("event") == "failed" and isinstance(number, int) and attempt in (None, number):
            failures.setdefault(number, event)
    return failures[max(failures)] if failures else None


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file; only its end is read."""
    with open(path, "rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _CHUNK_BYTES))
        return [_text(line) for line in stream.read().splitlines()[-count:]]
