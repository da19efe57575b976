"""The states of all runs under some roots, in one pass: what has ended is read once, and remembered.

A run that has ended does not change, so that its row is kept in the user's cache folder with a mark of the files that
would tell otherwise. Rows and folders are walked side by side, oldest first: however many there are, only their paths
are in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cfe_hpc.caches import cache_folder, recall, remember
from cfe_hpc.reports.find import run_paths
from cfe_hpc.reports.ongoing import Ongoing, follow_up
from cfe_hpc.reports.status import RunStatus, SchedulerWord, read_status
from cfe_hpc.runfolder import RunFolder

__all__ = ["Roster"]

_FORMAT = ",".join(["1", *RunStatus.__slots__])
"""Of the rows; another one has them all read again."""

_GONE_S = 7 * 86_400.0
"""A job that the scheduler has forgotten, and that gave no sign of life for so long, does not come back."""

_BOOKS_AGE_S = 7 * 86_400.0


class Roster:
    """The runs under the roots, oldest first. `unsettled` is called first, then `statuses`, each once.

    Args:
        newest_job: finds the newest job of a run, as control/ records it.
        cluster: a word for the one that is asked: another one may still know what it has forgotten.
    """

    def __init__(
        self, roots: Sequence[Path], newest_job: Callable[[RunFolder], dict[str, Any] | None], *, cluster: str = ""
    ) -> None:
        self._paths = sorted(run_paths(roots), key=_stamp)
        self._newest_job = newest_job
        word = hashlib.sha256("\0".join([_FORMAT, cluster, *sorted(map(str, roots))]).encode()).hexdigest()[:16]
        folder = cache_folder()
        self._index = None if folder is None else folder / f"runs-{word}.tsv"
        self._books = f"books-{word}.json"
        self._jobs: dict[str, dict[str, Any] | None] = {}
        self._outdated = False

    def __len__(self) -> int:
        return len(self._paths)

    def unsettled(self) -> list[tuple[RunFolder, dict[str, Any]]]:
        """Every run that has not ended, oldest first, and its newest job: what to ask schedulers about."""
        for path, mark, row in self._walk():
            if row is not None:
                continue
            if mark.startswith("-") and not os.path.exists(f"{path}/control/held"):
                self._jobs[path] = self._newest_job(RunFolder(Path(path)))
            else:
                self._outdated = True
        found = [(RunFolder(Path(path)), job) for path, job in self._jobs.items() if job is not None]
        return [(folder, job) for folder, newest in found for job in _jobs_of(folder, newest)]

    def statuses(self, words: Mapping[str, SchedulerWord]) -> Iterator[RunStatus]:
        """Every run's status, oldest first. What was found of those that have ended is kept when all were asked for.

        Args:
            words: the schedulers', by job id.
        """
        gone = {path for path, job in self._jobs.items() if job is not None and _is_gone(path, job, words)}
        kept = recall(self._books, max_age_s=_BOOKS_AGE_S) or {}
        books: dict[str, Any] = {}
        writing = _Rewriting(self._index) if self._index is not None and (self._outdated or gone) else None
        try:
            for path, mark, row in self._walk():
                status = _restored(row) or self._read(path, words, kept, books)
                if writing is not None and (path not in self._jobs or path in gone):
                    writing.add(mark, path, _stored(status) if row is None else row)
                yield status
            if writing is not None:
                writing.finish()
        finally:
            if writing is not None:
                writing.drop()
        if books or kept:
            remember(self._books, books)

    def _read(
        self, path: str, words: Mapping[str, SchedulerWord], kept: Mapping[str, Any], books: dict[str, Any]
    ) -> RunStatus:
        folder = RunFolder(Path(path))
        if path not in self._jobs:
            job = self._newest_job(folder)
            return read_status(folder, job_id=None if job is None else str(job["job_id"]), word=None)
        job = self._jobs[path]
        if folder.is_sweep:
            from cfe_hpc.reports.sweep import read_sweep, summary  # late: most runs are none

            return summary(folder, read_sweep(folder, words, brief=True))
        job_id = None if job is None else str(job["job_id"])
        ongoing = follow_up(folder, Ongoing.restored(kept.get(path)))
        if ongoing.worth_keeping:
            books[path] = ongoing.stored()
        return read_status(folder, job_id=job_id, word=words.get(job_id or ""), books=ongoing.summary)

    def _walk(self) -> Iterator[tuple[str, str, str | None]]:
        """Each run's path, the mark of its files now, and its row when that was written under the same mark."""
        lines = _lines(self._index)
        line = next(lines, None)
        for path in self._paths:
            while line is not None and _stamp(line[1]) < _stamp(path):
                line = next(lines, None)
            mark = _mark(path)
            yield path, mark, line[2] if line is not None and line[:2] == (mark, path) else None


def _jobs_of(folder: RunFolder, newest: dict[str, Any]) -> list[dict[str, Any]]:
    """All jobs to ask about: of a run the newest, of a sweep any that a task may be in."""
    if not folder.is_sweep:
        return [newest]
    from cfe_hpc.reports.sweep import live_jobs  # late: most runs are none

    return live_jobs(folder)


def _stamp(path: str) -> tuple[str, str]:
    """What runs are sorted by: the time in their run ids, then the path."""
    return path[-20:], path


def _mark(path: str) -> str:
    """Of the files that say how a run ended; another one when it goes on, or gets a new job. It begins with a dash
    when there is no result."""
    try:
        control_ns = os.stat(f"{path}/control").st_mtime_ns
    except OSError:
        control_ns = 0
    try:
        result = os.stat(f"{path}/result.json")
    except OSError:
        return f"-{control_ns:x}"
    return f"{result.st_ino:x}.{result.st_mtime_ns:x}.{result.st_size:x}.{control_ns:x}"


def _is_gone(path: str, job: Mapping[str, Any], words: Mapping[str, SchedulerWord]) -> bool:
    if str(job["job_id"]) in words or RunFolder(Path(path)).is_sweep:  # its tasks may have jobs of their own
        return False
    signs_s = []
    for name in ("control", "events.ndjson", "heartbeat.ndjson"):
        with contextlib.suppress(OSError):
            signs_s.append(os.stat(f"{path}/{name}").st_mtime)
    return time.time() - max(signs_s, default=0.0) > _GONE_S


def _stored(status: RunStatus) -> str:
    facts = {name: getattr(status, name) for name in RunStatus.__slots__}
    if status.heartbeat_age_s is not None:
        facts["heartbeat_age_s"] = round(time.time() - status.heartbeat_age_s, 1)
    return json.dumps(facts, separators=(",", ":"))


def _restored(row: str | None) -> RunStatus | None:
    """The status of a row, which holds the time of the last heartbeat in place of its age; None when it is damaged."""
    try:
        facts = json.loads(row or "")
        if facts["heartbeat_age_s"] is not None:
            facts["heartbeat_age_s"] = round(max(0.0, time.time() - facts["heartbeat_age_s"]), 1)
        return RunStatus(**facts)
    except (ValueError, KeyError, TypeError):
        return None


def _lines(index: Path | None) -> Iterator[tuple[str, str, str]]:
    """(mark, path, row) of each line of the index; those that are damaged are passed over."""
    try:
        stream = open(index, encoding="utf-8", errors="replace") if index is not None else None  # noqa: SIM115
    except OSError:
        return
    if stream is None:
        return
    with stream:
        for line in stream:
            fields = line.rstrip("\n").split("\t")
            if len(fields) == 3 and fields[2].endswith("}"):
                yield fields[0], fields[1], fields[2]


class _Rewriting:
    """Writes an index anew, beside the old one. A disk that takes it not is no reason to show nothing."""

    def __init__(self, index: Path) -> None:
        self._index, self._aside = index, index.with_name(f".{index.name}.{os.getpid()}")
        self._stream: TextIO | None = None
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)
            descriptor = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._stream = open(descriptor, "w", encoding="utf-8", errors="replace")  # noqa: SIM115

    def add(self, mark: str, path: str, row: str) -> None:
        """A line; runs whose paths hold its separators are left out, and read anew each time."""
        if self._stream is not None and not {"\t", "\n"} & set(path):
            try:
                self._stream.write(f"{mark}\t{path}\t{row}\n")
            except OSError:
                self.drop()

    def finish(self) -> None:
        """Put it in the old one's place."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
                os.replace(self._aside, self._index)
        self.drop()

    def drop(self) -> None:
        """Leave the old one."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)
