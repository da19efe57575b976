"""Every error a user can meet, and the exit code it ends the command with.

    CfeError                1  anything of ours; a message, never a traceback
    ├── ConfigError         2  a job file, a site profile, an environment variable or --set is wrong
    ├── UsageError          2  the command line, or the thing it names, is wrong
    │   └── PipelineError   2  the job is a pipeline, and one of its stages must be named
    ├── SchedulerError      3  the scheduler is unreachable or refused
    ├── ImpossibleError     4  well formed, planned, and can never run
    ├── RunFailed           1  a run, a check or a drill failed
    ├── NodeUnfit           1  a node cannot do its part: a device, a disk, its clock or the network
    ├── NonFinite           1  a loss or a gradient is NaN or infinite
    ├── DataError           1  a token file is missing, damaged or of another layout
    └── CheckpointError     1  a checkpoint could not be written or read
        ├── CorruptCheckpoint  a checkpoint is torn, altered, or a shard of it is missing
        ├── CheckpointMismatch a checkpoint is whole, but of another model, variant or layout
        ├── DiskFull           there was no room for a checkpoint
        └── StagingError       the state cannot be written beside training

Only `cfe_hpc.cli.main` turns an error into an exit code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CfeError",
    "CheckpointError",
    "CheckpointMismatch",
    "ConfigError",
    "CorruptCheckpoint",
    "DataError",
    "DiskFull",
    "ImpossibleError",
    "NodeUnfit",
    "NonFinite",
    "PipelineError",
    "Problem",
    "RunFailed",
    "SchedulerError",
    "StagingError",
    "UsageError",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with one place of one file: a line of an error report.

    Attributes:
        file: where the value came from: a path as the user gave it, `--set`, or an environment variable.
        key: dotted path of the key, "" when the whole file is meant.
        what: what is wrong, lower case, without the value.
        value: the offending value as the user would write it; None when there is none to show.
        remedy: what to do about it.
        check: id of the check that found it, see `config.checks`; "" where the error's kind tells enough.
    """

    file: str
    key: str
    what: str
    remedy: str
    value: Any = None
    check: str = ""

    def __str__(self) -> str:
        """`<file>: <key>: <what is wrong> (<value>); <what to do>`, on one line."""
        place = f"{self.file}: {self.key}: " if self.key else f"{self.file}: "
        shown = "" if self.value is None else f" ({_one_line(self.value)})"
        return _printable(f"{place}{self.what}{shown}; {self.remedy}")


def _one_line(value: Any, limit: int = 120) -> str:
    text = _printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _printable(text: str) -> str:
    # Line ends of any kind would break the one-line form, and escape sequences would reach the terminal.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class CfeError(Exception):
    """Base of all errors with a message made for users. `str(error)` is one line or several."""

    exit_code = 1


class _Problems(CfeError):
    """An error made of problems, all of them reported together."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(_Problems):
    """What the user wrote is wrong; holds every problem found, in the order of the files."""

    exit_code = 2


class ImpossibleError(_Problems):
    """The job is well formed but could never run at this site; holds every reason."""

    exit_code = 4


class UsageError(CfeError):
    """The command line names something that is not there or makes no sense."""

    exit_code = 2


class PipelineError(UsageError):
    """The job has stages, and none was chosen. `stages`: the names of all, and of those that each waits for."""

    def __init__(self, message: str, stages: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(message)
        self.stages = dict(stages)


class SchedulerError(CfeError):
    """The scheduler could not be reached, or refused what was asked."""

    exit_code = 3


class RunFailed(CfeError):
    """A run, a check or a drill ended badly."""


class NodeUnfit(CfeError):
    """A node cannot do its part of a run; the message names it and says what it lacks."""


class NonFinite(CfeError):
    """A loss or a gradient is NaN or infinite; the message names the value and the step."""


class DataError(CfeError):
    """A token file is missing, damaged or laid out otherwise than expected."""


class CheckpointError(CfeError):
    """A checkpoint could not be written or read."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint is torn or altered; the message names the folder, the file and what differs."""


class CheckpointMismatch(CheckpointError):
    """A whole checkpoint that belongs to another model, variant, engine or layout; every difference is named."""


class DiskFull(CheckpointError):
    """A checkpoint was not written for want of room: what rotation allows to delete may make it."""


class StagingError(CheckpointError):
    """The state does not fit the memory allowed for staging, or a writer process could not be started."""
