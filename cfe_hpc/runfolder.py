"""The run folder: all that login node, ranks and people know of a run lies here, in readable files.

<runs root>/<job name>/<run id>/
    run.toml            resolved job, site and plan; written once
    submission.sh       what went to sbatch
    logs/               <slurm job id>.<attempt>.<rank>.out and .err
    events.ndjson       what happened, in order
    heartbeat.ndjson    one line a logged step, from rank 0
    checkpoints/        step-000000400/ …
    exports/            weights of epochs' ends, for other programs
    result.json         how it ended
    control/            requests and promises between processes; each a small file, written once
    control/spare-0 …   room for those, and for result.json, when the disk is full

A sweep's folder has run.toml (the job without its axes), submission.sh, events.ndjson and control/ as well, and
    sweep.json          axes, and what makes each task's values
    tasks/000012/       a run folder of its own, made when the task starts; its run id is <sweep id>.000012
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from cfe_hpc.files import append_ndjson, lay_up, read_ndjson, write_atomic, written_aside

__all__ = ["EVENTS", "Event", "RunFolder", "new_run_id", "safe_name", "utc_now"]

Event = Literal[
    "submitted",
    "started",
    "resumed",
    "checkpoint_saved",
    "checkpoint_failed",
    "signal",
    "preempted",
    "requeued",
    "rolled_back",
    "degraded",
    "failed",
    "completed",
    "cancelled",
    "held",
]
EVENTS: tuple[str, ...] = Event.__args__  # type: ignore[attr-defined]

_NUM_SPARES = 6
"""An attempt may need three, for why it ends, that it has and what follows, and a run's end three more."""

_SPARE_BYTES = 8192
"""More than a result.json takes, with room for some hundred metrics."""

logger = logging.getLogger(__name__)

RUN_ID = re.compile(r"^.+-\d{8}-\d{6}-[0-9a-f]{4}$")
"""Of a run, or a sweep; a sweep's task has its number, in six digits, after a dot."""

_TASK = re.compile(r"^\d{6}$")
_TASKS = "tasks"


def utc_now() -> str:
    """The time as RFC 3339 in UTC with milliseconds: 2026-01-31T23:59:59.123Z."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def safe_name(name: str) -> str:
    """`name` as one path component that no shell, Slurm pattern or filesystem stumbles over.

    Letters, digits, dot, dash and underscore stay; every run of others becomes one dash. Two names may meet in
    one folder: run ids keep their runs apart.
    """
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return cleaned[:80] or "job"


def new_run_id(job_name: str) -> str:
    """`<job>-<YYYYMMDD-HHMMSS>-<4 hex>`, the time in UTC."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return f"{safe_name(job_name)}-{stamp}-{os.urandom(2).hex()}"


class RunFolder:
    """Paths and journals of one run. Making one touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        task = self.sweep_task
        self.run_id = path.name if task is None else f"{path.parent.parent.name}.{path.name}"

    @classmethod
    def create(cls, runs_root: Path, job_name: str) -> RunFolder:
        """A new folder with a fresh run id and its sub-folders.

        Raises:
            OSError: the runs root cannot be written.
        """
        parent = runs_root / safe_name(job_name)
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = cls(parent / new_run_id(job_name))
            try:
                folder.path.mkdir()
            except FileExistsError:
                continue
            for sub in (folder.logs, folder.checkpoints, folder.control):
                sub.mkdir()
            return folder

    @property
    def is_sweep(self) -> bool:
        """Whether this is the folder of a sweep. Looks at the disk."""
        return self.sweep_json.is_file()

    @property
    def sweep_task(self) -> int | None:
        """The number of the sweep's task whose folder this is; None for a run, or a sweep. By the path alone."""
        is_task = _TASK.match(self.path.name) and self.path.parent.name == _TASKS
        return int(self.path.name) if is_task and RUN_ID.match(self.path.parent.parent.name) else None

    @property
    def sweep(self) -> RunFolder | None:
        """The sweep that this task belongs to; None for a run, or a sweep."""
        return None if self.sweep_task is None else RunFolder(self.path.parent.parent)

    @property
    def top(self) -> RunFolder:
        """The folder that lies under <runs root>/<job name>: the task's sweep, else this one."""
        return self.sweep or self

    @property
    def is_cancelled(self) -> bool:
        """Whether the run was cancelled, or with its whole sweep a task that was not sent again since. Looks at the
        disk."""
        if self.promised("cancel") is not None or self.sweep is None:
            return self.promised("cancel") is not None
        return self.sweep.promised("cancel") is not None and self.promised("again") is None

    def task(self, number: int) -> RunFolder:
        """The folder of a sweep's task, whether it is there yet or not."""
        return RunFolder(self.path / _TASKS / f"{number:06d}")

    def tasks(self) -> list[RunFolder]:
        """The folders of a sweep's tasks that have started, by number; empty for a run."""
        try:
            names = sorted(name for name in os.listdir(self.path / _TASKS) if _TASK.match(name))
        except FileNotFoundError:
            return []
        return [RunFolder(self.path / _TASKS / name) for name in names]

    @property
    def sweep_json(self) -> Path:
        return self.path / "sweep.json"

    @property
    def run_toml(self) -> Path:
        return self.path / "run.toml"

    @property
    def submission_script(self) -> Path:
        return self.path / "submission.sh"

    @property
    def starter(self) -> Path:
        return self.path / "start.py"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def export_script(self) -> Path:
        return self.path / "export.sh"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def events_path(self) -> Path:
        return self.path / "events.ndjson"

    @property
    def heartbeat_path(self) -> Path:
        return self.path / "heartbeat.ndjson"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    def log_stem(self, *, job_id: str, attempt: int, rank: int | str) -> str:
        """Name of a rank's log without its ending, `<job id>.<attempt>.<rank>`; a launcher's has "node1" for rank."""
        return f"{job_id}.{attempt}.{rank}"

    def append_event(self, event: Event, *, attempt: int | None, **fields: Any) -> None:
        """Append one line to events.ndjson; fields that are None are left out.

        Args:
            attempt: the attempt it happened in; None before the first.
            fields: as fits: step, rank, host, reason, seconds, detail.

        Raises:
            OSError: the line is not written.
        """
        record = {"time": utc_now(), "event": event, "run_id": self.run_id, "attempt": attempt, **fields}
        append_ndjson(self.events_path, {key: value for key, value in record.items() if value is not None})

    def note_event(self, event: Event, *, attempt: int | None, **fields: Any) -> None:
        """`append_event`, but a line that cannot be written is lost, with a warning: it is not worth the run."""
        try:
            self.append_event(event, attempt=attempt, **fields)
        except OSError as error:
            logger.warning("the event %s is lost: %s: %s", event, self.events_path, error.strerror)

    def events(self) -> Iterator[dict[str, Any]]:
        """The events so far, oldest first."""
        return read_ndjson(self.events_path)

    def heartbeats(self) -> Iterator[dict[str, Any]]:
        """The heartbeat lines so far, oldest first."""
        return read_ndjson(self.heartbeat_path)

    def result(self) -> dict[str, Any] | None:
        """What result.json says; None while there is none (or it is not readable as JSON)."""
        try:
            loaded = json.loads(self.result_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return loaded if isinstance(loaded, dict) else None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, atomically, on a full disk too. Raises OSError."""
        content = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.result_path, content, spares=self._spares)

    def reopen(self) -> None:
        """Take back what an earlier attempt said of the run's end: an attempt begins, so it has not ended."""
        for folder in {self.path, self.top.path}:  # a task of a sweep: its sweep has not ended either
            RunFolder(folder).result_path.unlink(missing_ok=True)
        (self.control / "held").unlink(missing_ok=True)
        lay_up(self._spares, _SPARE_BYTES)

    @property
    def _spares(self) -> list[Path]:
        return [self.control / f"spare-{number}" for number in range(_NUM_SPARES)]

    def promise(self, name: str, **facts: Any) -> bool:
        """Make `control/<name>` with `facts` as JSON, once and for all, on a full disk too.

        Returns:
            True for the one caller, of all processes and nodes, that made it; False when it was there already.

        Raises:
            OSError: it cannot be made.
        """
        self.control.mkdir(exist_ok=True)
        path = self.control / name
        content = json.dumps({"time": utc_now(), **facts}) + "\n"
        # Not synced: a stop must not wait for a checkpoint that the disk is still writing.
        with written_aside(path, content, spares=self._spares, synced=False) as aside:
            try:
                os.link(aside, path)  # atomic on NFS too, unlike O_EXCL on old servers
            except FileExistsError:
                return False
        return True

    def note(self, name: str, meaning: str, /, **facts: Any) -> bool:
        """`promise`, but one that cannot be made is a warning, and True: its `meaning` holds all the same."""
        try:
            return self.promise(name, **facts)
        except OSError as error:
            logger.warning("%s, but that cannot be noted: %s: %s", meaning, self.control, error.strerror)
            return True

    def promised(self, name: str) -> dict[str, Any] | None:
        """The facts of `control/<name>`; None when nobody made it."""
        try:
            facts = json.loads((self.control / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None
