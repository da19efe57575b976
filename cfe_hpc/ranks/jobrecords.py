"""A run's jobs, and whatever else it has several of, as files of control/: job, job-1, job-2 …

They stand apart from what sends jobs, so that whoever only looks at runs loads none of it.
"""

from __future__ import annotations

from typing import Any

from cfe_hpc.runfolder import RunFolder

__all__ = ["SAVE", "record", "record_job", "records", "unused_attempt"]

SAVE = "save"
"""The kind of records that ask for a checkpoint now: control/save, save-1 …"""


def record_job(folder: RunFolder, **facts: object) -> None:
    """Write a job of the run to control/job, or the next free control/job-<k> when there is one already."""
    record(folder, "job", **facts)


def record(folder: RunFolder, kind: str, **facts: object) -> None:
    """Write control/<kind>, or the next free control/<kind>-<k> when there is one already. Raises OSError."""
    name, earlier = kind, 0
    while not folder.promise(name, **facts):
        earlier += 1
        name = f"{kind}-{earlier}"


def records(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    """What `record` has written of a kind, oldest first."""
    found = []
    record = folder.promised(kind)
    while record is not None:
        found.append(record)
        record = folder.promised(f"{kind}-{len(found)}")
    return found


def unused_attempt(folder: RunFolder) -> int:
    """A number for the next attempt that no earlier one has left a word under: promises are made once per number,
    and an attempt that died while it was starting up has made some, too."""
    attempts = [event.get("attempt") for event in folder.events()]
    return 1 + max((attempt for attempt in attempts if isinstance(attempt, int)), default=-1)
