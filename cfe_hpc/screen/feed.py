"""What the screen shows, gathered apart from it: runs, their newest heartbeats, how full the nodes are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfe_hpc.files import read_ndjson
from cfe_hpc.launch.jobs import latest_job
from cfe_hpc.launch.occupancy import Occupancy, occupancy
from cfe_hpc.reports.roster import Roster
from cfe_hpc.reports.status import RunStatus, SchedulerWord
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["Feed", "Line", "Picture"]

Ask = Callable[[Sequence[tuple[RunFolder, dict[str, Any]]]], tuple[dict[str, SchedulerWord], list[str]]]

_TAIL_BYTES = 32 * 1024
_NUM_ENDED = 20
_NUM_LOSSES = 40
_OVER = ("COMPLETED", "FAILED", "CANCELLED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One run.

    Attributes:
        losses: of the newest heartbeats, oldest first.
        beat_every_s: usual time between heartbeats; None while there are too few.
        stalled: it runs, and its last heartbeat is older than it should be.
        nodes: as the scheduler spells them.
    """

    status: RunStatus
    losses: tuple[float, ...] = ()
    beat_every_s: float | None = None
    stalled: bool = False
    nodes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All that there is to show, at one time.

    Attributes:
        hidden: runs that ended so long ago that they have no line.
        counts: runs by state, those hidden too.
        failures: what schedulers that gave no answer said.
        taken_s: epoch seconds.
    """

    lines: tuple[Line, ...]
    hidden: int
    counts: Mapping[str, int]
    partitions: tuple[Occupancy, ...]
    failures: tuple[str, ...]
    taken_s: float


class Feed:
    """Takes pictures of the runs under some roots, or of one.

    Args:
        ask: asks schedulers about jobs, no more often than they like; see cli.status.ask.
        only: the one run to show.
    """

    def __init__(self, *, roots: Sequence[Path], ask: Ask, only: RunFolder | None = None) -> None:
        self._roots, self._ask, self._only = roots, ask, only

    def picture(self) -> Picture:
        """The picture now. Reads files and may ask schedulers: seconds may pass."""
        roster = Roster(self._roots, latest_job)
        words, failures = self._ask(roster.unsettled())
        counts: dict[str, int] = {}
        live: list[Line] = []
        ended: list[Line] = []
        for status in roster.statuses(words):
            if self._only is not None and status.run_id != self._only.run_id:
                continue
            counts[status.state] = counts.get(status.state, 0) + 1
            word = words.get(status.job_id or "")
            (ended if status.state in _OVER else live).append(_line(status, "" if word is None else word.nodes))
        shown = [*reversed(live), *reversed(ended[-_NUM_ENDED:])]
        return Picture(
            lines=tuple(shown),
            hidden=max(0, len(ended) - _NUM_ENDED),
            counts=counts,
            partitions=occupancy(),
            failures=tuple(failures),
            taken_s=time.time(),
        )


def _line(status: RunStatus, nodes: str) -> Line:
    if status.state not in ("RUNNING",):
        return Line(status=status, nodes=nodes)
    losses, times_s = [], []
    for beat in read_ndjson(Path(status.run_dir, "heartbeat.ndjson"), last_bytes=_TAIL_BYTES):
        if isinstance(beat.get("loss"), (int, float)):
            losses.append(float(beat["loss"]))
        said_s = epoch_s(beat.get("time"))
        times_s += [] if said_s is None else [said_s]
    return Line(status=status, losses=tuple(losses[-_NUM_LOSSES:]), nodes=nodes)
