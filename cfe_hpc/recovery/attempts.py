"""A run's attempts, read back from its events: where each started, what it saved, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from cfe_hpc.recovery.causes import CAUSES, Cause, of_text, row
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["KILLED", "Attempt", "Leg", "attempts_of", "cause_of", "read_attempts"]

KILLED = "killed"
"""`detail` of a `failed` event whose reason is a signal from outside, no error of the job's own."""

_CAUSES: dict[str, Cause] = {each.cause: each.cause for each in CAUSES} | {"requeued_already": "requeue_requested"}

_OF_NODES: tuple[Cause, ...] = ("node_failure", "node_unfit")


@dataclass(slots=True, kw_only=True)
class Leg:
    """A stretch of an attempt in which steps only go up. A roll-back ends one and begins the next.

    Attributes:
        step: steps done at its beginning; None when nothing says so.
        began_s: epoch seconds; a heartbeat belongs to the newest leg of its attempt that began before it.
    """

    step: int | None = None
    began_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One allocation of a run, or after a restart inside it the rest of one, as far as its events tell.

    Steps are counts of steps done; times are epoch seconds.

    Attributes:
        restart: 0, or how often the launcher had started the ranks again in this allocation.
        started_s: when its rank 0's process began: `started` is said only once torch is loaded and the model built.
        allocated_s: when the scheduler gave it its nodes; None when its batch script did not say.
        ended_s: when its batch script or its supervisor saw the ranks end; only `attempts_of` knows it.
        hosts: names of its nodes, in the order of their ranks.
        resumed_from: steps done when it took up the work; None when it never came so far, or says nothing of it.
        legs: in order; never empty. All but the first begin at a roll-back.
        saved_step: newest step it committed a checkpoint of that a roll-back has not taken away.
        last_step: newest step any of its events names.
        counts_steps: it has said something about steps at all; a plain `command` job never does.
        ended_by: None while nothing says that it ended.
        cause: of its first error that is not the echo of another one; None when it reported none.
        error: the text of that error, or how it died without one.
        vague: the error is no more than an exit status, and nobody has said what it means.
        killed: it died by a signal from outside, which says nothing about the job itself.
        requeued: another attempt was asked for or promised.
        undone: roll-backs.
        bad_hosts: nodes that an error of this attempt names as failed or unfit.
    """

    number: int
    restart: int = 0
    job_id: str | None = None
    host: str | None = None
    hosts: tuple[str, ...] = ()
    total_steps: int | None = None
    allocated_s: float | None = None
    started_s: float | None = None
    ended_s: float | None = None
    last_sign_s: float = 0.0
    resumed_from: int | None = None
    legs: list[Leg] = field(default_factory=lambda: [Leg()])
    saved_step: int | None = None
    last_step: int | None = None
    counts_steps: bool = False
    ended_by: Cause | Literal["completed", "held"] | None = None
    cause: Cause | None = None
    error: str | None = None
    vague: bool = False
    killed: bool = False
    requeued: bool = False
    undone: int = 0
    bad_hosts: tuple[str, ...] = ()

    @property
    def gained(self) -> bool:
        """Whether it left the run further than it found it."""
        return (self.saved_step or 0) > (self.resumed_from or 0)


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def cause_of(failed: dict[str, Any]) -> Cause:
    """The cause that a `failed` event gives, or that its words tell where it gives none."""
    return _CAUSES.get(str(failed.get("cause"))) or of_text(str(failed.get("reason", "")))


def attempts_of(folder: RunFolder) -> list[Attempt]:
    """`read_attempts` of a run's events, with the ends that its batch script or its supervisor has noted."""
    attempts = read_attempts(folder.events())
    last = {attempt.number: attempt for attempt in attempts}
    for number, attempt in last.items():
        ended = folder.promised(f"ended-{number}")
        attempt.ended_s = None if ended is None else epoch_s(ended.get("time"))
    return attempts


def read_attempts(events: Iterable[dict[str, Any]]) -> list[Attempt]:
    """The attempts in the order of their numbers. Events without an attempt (`submitted`) are passed over.

    Where a launcher starts the ranks again in the same allocation, what follows is an Attempt of its own with the
    same number. One that ended without a word and has a successor was ended by a signal that its ranks still wrote
    down (taken for a preemption), or by its node.
    """
    found: dict[int, list[Attempt]] = {}
    signalled: set[int] = set()
    for event in events:
        number = event.get("attempt")
        if not isinstance(number, int):
            continue
        parts = found.setdefault(number, [Attempt(number=number)])
        if event.get("event") == "signal":
            signalled.add(number)
        restart = _restart(event)
        if restart > parts[-1].restart:
            # It is the launcher that follows up on an error here.
            parts[-1].requeued, parts[-1].ended_by = True, parts[-1].cause or "failed"
            parts.append(Attempt(number=number, restart=restart))
        _take(parts[-1], event)
    attempts = [attempt for number in sorted(found) for attempt in found[number]]
    for attempt in attempts[:-1]:
        # Whoever follows up on a failure writes `requeued`. Where nobody did, the scheduler took the job back by
        # itself: the errors are those of ranks whose peers were gone.
        silent = attempt.ended_by is None or (attempt.ended_by == attempt.cause and not attempt.requeued)
        if silent and attempt.cause not in _OF_NODES:
            attempt.ended_by = "preempted" if attempt.number in signalled else "node_failure"
    return attempts


def _restart(event: dict[str, Any]) -> int:
    detail = event.get("detail")
    restart = detail.get("restart") if event.get("event") == "started" and isinstance(detail, dict) else None
    return restart if isinstance(restart, int) else 0


def _take(attempt: Attempt, event: dict[str, Any]) -> None:
    """Add one event of the attempt to what is known of it."""
    name, step, said_s = event.get("event"), event.get("step"), epoch_s(event.get("time"))
    attempt.last_sign_s = max(attempt.last_sign_s, said_s or 0.0)
    if isinstance(step, int):
        attempt.counts_steps = True
        attempt.last_step = max(attempt.last_step or 0, step)
        _take_step(attempt, name, step, said_s)
    if name == "started":
        _take_start(attempt, event, said_s)
    elif name == "failed":
        _take_failure(attempt, event)
    elif name == "requeued":
        attempt.requeued = True
        attempt.ended_by = _CAUSES.get(str(event.get("reason")), attempt.ended_by or "requeue_requested")
    elif name == "preempted":
        attempt.ended_by = "preempted"
    elif name in ("cancelled", "completed", "held"):
        attempt.ended_by = name


def _take_step(attempt: Attempt, name: Any, step: int, said_s: float | None) -> None:
    if name == "resumed":
        attempt.resumed_from = step
        attempt.legs[-1] = Leg(step=step, began_s=said_s)
    elif name == "checkpoint_saved":
        attempt.saved_step = max(attempt.saved_step or 0, step)
    elif name == "rolled_back":
        attempt.undone += 1
        attempt.legs.append(Leg(step=step, began_s=said_s))
        if attempt.saved_step is not None:
            attempt.saved_step = min(attempt.saved_step, step)


def _take_start(attempt: Attempt, event: dict[str, Any], said_s: float | None) -> None:
    detail = event.get("detail")
    facts = detail if isinstance(detail, dict) else {}
    if attempt.started_s is None and said_s is not None:
        attempt.started_s = said_s - _seconds(facts.get("startup_seconds"))
        attempt.legs[0].began_s = attempt.legs[0].began_s or attempt.started_s
    attempt.host = event.get("host")
    hosts = facts.get("hosts")
    attempt.hosts = tuple(str(host) for host in hosts) if isinstance(hosts, list) else attempt.hosts
    attempt.job_id = facts.get("job_id", attempt.job_id)
    attempt.allocated_s = _seconds(facts.get("allocated_s")) or attempt.allocated_s
    attempt.total_steps = facts.get("total_steps", attempt.total_steps)
    attempt.counts_steps = attempt.counts_steps or attempt.total_steps is not None


def _take_failure(attempt: Attempt, event: dict[str, Any]) -> None:
    """The first error stands, unless it is one that another rank's may have brought about, or says no more than how a
    program ended, and somebody has looked into it."""
    cause = cause_of(event)
    attempt.killed = attempt.killed or event.get("detail") == KILLED
    if cause in _OF_NODES and isinstance(event.get("host"), str):
        attempt.bad_hosts = (*attempt.bad_hosts, event["host"])
    vague = "cause" not in event and cause == "failed" and event.get("detail") != KILLED
    weak = attempt.vague or (attempt.cause is not None and row(attempt.cause).symptom)
    if attempt.cause is None or (weak and not vague and not row(cause).symptom):
        if attempt.ended_by == attempt.cause:
            attempt.ended_by = cause
        attempt.cause, attempt.error, attempt.vague = cause, str(event.get("reason", "")), vague
