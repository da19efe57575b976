"""The logs of a run's ranks: which files there are, what is new in them by time, and which rank failed first."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cfe_hpc.recovery.evidence import first_word
from cfe_hpc.recovery.logfiles import RankLog, line_text, rank_logs
from cfe_hpc.reports.stamps import stamp_s
from cfe_hpc.runfolder import RunFolder

__all__ = ["Follower", "first_failure"]

_CHUNK_BYTES = 1 << 20
_CHUNKS_BYTES = 32 << 20
"""Of all the files that are merged, together."""


@dataclass(slots=True)
class _Place:
    """How far a file was read.

    Attributes:
        partial: the beginning of a line whose end is still to come.
        clock_s: the newest stamp so far; lines without one follow the line before them.
        year: of stamps that name none.
    """

    read_bytes: int = 0
    partial: bytes = b""
    clock_s: float = float("-inf")
    year: int = 0


class Follower:
    """Reads log files as they grow, new files of new attempts too, merged by time.

    Lines are ordered by the stamps they begin with, each file's own order kept; what no stamp orders comes file by
    file. Of two calls, the second one's lines come later, whatever they say: they arrived later.

    Args:
        rank, attempt: this one's only; all when None.
        tail_bytes: leave out earlier attempts, and all but so much of the ends of the newest one's files.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        rank: int | None = None,
        attempt: int | None = None,
        tail_bytes: int | None = None,
    ) -> None:
        self._folder, self._rank, self._attempt, self._tail_bytes = folder, rank, attempt, tail_bytes
        self._places: dict[Path, _Place] = {}

    def news(self, *, whole: bool = False) -> Iterator[tuple[RankLog, str]]:
        """Lines written since the last call, attempt by attempt, without their line ends.

        Args:
            whole: nothing more will come: give a last line that lacks its end too.
        """
        logs = rank_logs(self._folder, rank=self._rank, attempt=self._attempt)
        if self._tail_bytes is not None:
            self._pass_over(logs, self._tail_bytes)
            self._tail_bytes = None
        for _, group in groupby(logs, key=lambda log: log.attempt):
            together = list(group)
            chunk_bytes = max(4096, min(_CHUNK_BYTES, _CHUNKS_BYTES // len(together)))
            streams = [self._stamped(log, chunk_bytes, whole) for log in together]
            for _, log, line in heapq.merge(*streams, key=lambda each: each[0]):
                yield log, line

    def _pass_over(self, logs: list[RankLog], tail_bytes: int) -> None:
        """Leave out all but the ends of the newest attempt's files."""
        newest = max((log.attempt for log in logs), default=0)
        for log in logs:
            with open(log.path, "rb") as stream:
                end = stream.seek(0, os.SEEK_END)
                if log.attempt == newest and end > tail_bytes:
                    stream.seek(end - tail_bytes)
                    stream.readline()  # what is left of a line
                elif log.attempt == newest:
                    stream.seek(0)
                self._places[log.path] = _Place(read_bytes=stream.tell())

    def _stamped(self, log: RankLog, chunk_bytes: int, whole: bool) -> Iterator[tuple[float, RankLog, str]]:
        place = self._places.setdefault(log.path, _Place())
        for line in self._lines(log.path, place, chunk_bytes, whole):
            said_s = stamp_s(line, year=place.year)
            place.clock_s = max(place.clock_s, said_s or place.clock_s)
            yield place.clock_s, log, line

    def _lines(self, path: Path, place: _Place, chunk_bytes: int, whole: bool) -> Iterator[str]:
        # Opened for each chunk: there may be more ranks than a process may have files open.
        while chunk := _read(path, place, chunk_bytes):
            *lines, place.partial = (place.partial + chunk).split(b"\n")
            yield from map(line_text, lines)
        if whole and place.partial:
            rest, place.partial = place.partial, b""
            yield line_text(rest)


def _read(path: Path, place: _Place, chunk_bytes: int) -> bytes:
    """The next bytes of the file; none at its end, or when it is gone."""
    try:
        with open(path, "rb") as stream:
            stream.seek(place.read_bytes)
            chunk = stream.read(chunk_bytes)
            place.year = place.year or time.localtime(os.fstat(stream.fileno()).st_mtime).tm_year
    except FileNotFoundError:
        return b""
    place.read_bytes += len(chunk)
    return chunk


def first_failure(folder: RunFolder, *, attempt: int | None = None) -> dict[str, Any] | None:
    """The `failed` event that tells why the newest attempt that has one failed, or the given attempt; None when there
    is none. Errors that may be the echo of another rank's come last."""
    events = list(folder.events())
    failed = [event["attempt"] for event in events if event["event"] == "failed" and isinstance(event["attempt"], int)]
    number = max(failed, default=None) if attempt is None else attempt
    return None if number is None else first_word(events, attempt=number)
