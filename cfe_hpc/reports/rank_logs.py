"""The logs of a run's ranks: which files there are, what is new in them, and which rank failed first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfe_hpc.recovery.evidence import first_word
from cfe_hpc.recovery.logfiles import RankLog, line_text, rank_logs
from cfe_hpc.runfolder import RunFolder

__all__ = ["Follower", "first_failure"]

_CHUNK_BYTES = 1 << 20


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
                yield log, line_text(rest)

    def _lines(self, path: Path) -> Iterator[str]:
        with open(path, "rb") as stream:
            stream.seek(self._read.get(path, 0))
            while chunk := stream.read(_CHUNK_BYTES):
                self._read[path] = stream.tell()
                *lines, rest = (self._partial.pop(path, b"") + chunk).split(b"\n")
                if rest:
                    self._partial[path] = rest
                yield from map(line_text, lines)


def first_failure(folder: RunFolder, *, attempt: int | None = None) -> dict[str, Any] | None:
    """The `failed` event that tells why the newest attempt that has one failed, or the given attempt; None when there
    is none. Errors that may be the echo of another rank's come last."""
    events = list(folder.events())
    failed = [event["attempt"] for event in events if event["event"] == "failed" and isinstance(event["attempt"], int)]
    number = max(failed, default=None) if attempt is None else attempt
    return None if number is None else first_word(events, attempt=number)
