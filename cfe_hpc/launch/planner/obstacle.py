"""One limit that stands between a job and its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Obstacle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """One limit that stands against a job.

    Attributes:
        limit: whose name people look for: "MaxTime", "QOS", "account", "GRES" …
        reason: what squeue says of the job, or, when `refused`, sbatch.
        refused: sbatch does not take the job; otherwise it is taken, and pends.
        for_ever: only another job, or another site, changes it; otherwise it passes.
        until_s: when it passes, in seconds since the epoch; None when nobody knows.
        time_s: the longest time limit that it allows; None when it is about something else.
    """

    limit: str
    reason: str
    refused: bool
    for_ever: bool
    what: str
    remedy: str
    until_s: float | None = None
    time_s: float | None = None

    def __str__(self) -> str:
        """One line for people: what, and what to do."""
        return f"{self.limit}: {self.what}; {self.remedy}"

    def as_json(self) -> dict[str, Any]:
        """The obstacle as a JSON object."""
        names = ("limit", "reason", "refused", "for_ever", "what", "remedy", "until_s")
        return {name: getattr(self, name) for name in names}
