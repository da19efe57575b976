"""What the screen shows, gathered apart from it: runs, their newest heartbeats, how full the nodes are."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from cfe_hpc.files import read_ndjson
from cfe_hpc.launch.jobs import latest_job
from cfe_hpc.launch.occupancy import Occupancy, occupancy
from cfe_hpc.launch.queue import cluster_key
from cfe_hpc.reports.roster import Roster
from cfe_hpc.reports.status import RunStatus, SchedulerWord, is_settled, read_status
from cfe_hpc.reports.sweep import live_jobs, read_sweep
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["Feed", "Line", "Picture"]

Ask = Callable[[Sequence[tuple[RunFolder, dict[str, Any]]]], tuple[dict[str, SchedulerWord], list[str]]]

_TAIL_BYTES = 16 * 1024
_NUM_ENDED = 20
_NUM_LOSSES = 40
_STALLED_S = 60.0
_OVER = ("COMPLETED", "FAILED", "CANCELLED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One run.

    Attributes:
        losses: of the newest heartbeats, oldest first.
        tokens_per_s: of the newest; None when it does not say.
        left_s: seconds of the steps that are left, at the pace of the newest.
        beat_every_s: usual time between heartbeats; None while there are too few.
        stalled: it runs, and its last heartbeat is older than it should be.
        nodes: as the scheduler spells them.
    """

    status: RunStatus
    losses: tuple[float, ...] = ()
    tokens_per_s: float | None = None
    left_s: float | None = None
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
    """

    lines: tuple[Line, ...]
    hidden: int
    counts: Mapping[str, int]
    partitions: tuple[Occupancy, ...]
    failures: tuple[str, ...]


class Feed:
    """Takes pictures of the runs under some roots, of one, or of a sweep's tasks.

    Args:
        ask: asks schedulers about jobs, no more often than they like; see cli.status.ask.
        only: the one run, or sweep, to show.
    """

    def __init__(self, *, roots: Sequence[Path], ask: Ask, only: RunFolder | None = None) -> None:
        self._roots, self._ask, self._only = roots, ask, only

    def picture(self) -> Picture:
        """The picture now. Reads files and may ask schedulers: seconds may pass."""
        statuses, words, failures = self._statuses()
        counts: Counter[str] = Counter()
        live: list[Line] = []
        ended: deque[Line] = deque(maxlen=_NUM_ENDED)
        for status in statuses:
            counts[status.state] += 1
            word = words.get(status.job_id or "")
            (ended if status.state in _OVER else live).append(_line(status, "" if word is None else word.nodes))
        return Picture(
            lines=(*sorted(reversed(live), key=_urgency), *reversed(ended)),
            hidden=sum(counts.values()) - len(live) - len(ended),
            counts=counts,
            partitions=occupancy(),
            failures=tuple(failures),
        )

    def _statuses(self) -> tuple[Iterable[RunStatus], Mapping[str, SchedulerWord], Sequence[str]]:
        """(the runs, oldest first, what schedulers said of them, what those that gave no answer said)."""
        only = self._only
        if only is None:
            roster = Roster(self._roots, latest_job, cluster=cluster_key())
            words, failures = self._ask(roster.unsettled())
            return roster.statuses(words), words, failures
        if only.is_sweep:
            words, failures = self._ask([(only, job) for job in live_jobs(only)])
            return [task.status for task in read_sweep(only, words)], words, failures
        job = latest_job(only)
        words, failures = self._ask([] if job is None or is_settled(only) else [(only, job)])
        job_id = None if job is None else str(job["job_id"])
        return [read_status(only, job_id=job_id, word=words.get(job_id or ""))], words, failures


def _urgency(line: Line) -> int:
    """What comes first on the screen: what needs somebody, then what works, then what waits."""
    return 0 if line.stalled else ("HELD", "RUNNING", "PENDING").index(line.status.state) + 1


def _line(status: RunStatus, nodes: str) -> Line:
    if status.state != "RUNNING" or status.attempt is None:
        return Line(status=status, nodes=nodes)
    tail = read_ndjson(Path(status.run_dir, "heartbeat.ndjson"), last_bytes=_TAIL_BYTES)
    beats = [beat for beat in tail if beat.get("attempt") == status.attempt]
    stamps_s = [said_s for beat in beats if (said_s := epoch_s(beat.get("time"))) is not None]
    gaps_s = [later - before for before, later in pairwise(stamps_s)]
    losses = [float(beat["loss"]) for beat in beats if isinstance(beat.get("loss"), (int, float))]
    newest = beats[-1] if beats else {}
    return Line(
        status=status,
        losses=tuple(losses[-_NUM_LOSSES:]),
        tokens_per_s=_number(newest.get("tokens_per_second")),
        left_s=_left_s(status, _number(newest.get("step_seconds"))),
        beat_every_s=median(gaps_s) if gaps_s else None,
        stalled=bool(beats) and (status.heartbeat_age_s or 0.0) > _patience_s(gaps_s),
        nodes=nodes,
    )


def _patience_s(gaps_s: Sequence[float]) -> float:
    """The age of a heartbeat from which on its run is taken for stalled. Saves and evaluations take their time: the
    longest gap so far is no alarm, nor twice that."""
    return max(_STALLED_S, 2 * max(gaps_s, default=0.0), 10 * (median(gaps_s) if gaps_s else 0.0))


def _left_s(status: RunStatus, step_s: float | None) -> float | None:
    if step_s is None or status.step is None or status.total_steps is None:
        return None
    return max(0, status.total_steps - status.step) * step_s


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
