"""What a drill has shown: read from the run's own events, heartbeats and checkpoint, question by question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfe_hpc.units import epoch_s, format_seconds

__all__ = ["Check", "Evidence", "checks", "times_s"]

_ORDER = ("heard", "saved", "requeued", "allocated", "started", "resumed", "first_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question and its answer."""

    name: str
    ok: bool
    text: str


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What was seen of a drill.

    Attributes:
        attempt: the one that was told to stop.
        told_s: epoch seconds of the telling.
        joined: the program is one that counts steps and saves.
        num_ranks: of the attempt that was told.
        events: those that were written after the telling.
        first_beat: of the attempt after it, the first heartbeat beyond the step it took up from.
        checkpoint: (ranks that saved it, why it cannot be used or None); None while none was looked at.
        lost_steps: by this drill; None when it was not seen how it went on.
    """

    attempt: int
    told_s: float
    joined: bool
    num_ranks: int
    events: Sequence[Mapping[str, Any]] = ()
    first_beat: Mapping[str, Any] | None = None
    checkpoint: tuple[int, str | None] | None = None
    lost_steps: int | None = None

    def event(self, name: str, *, later: bool = False) -> Mapping[str, Any] | None:
        """The first event of this name of the attempt that was told, or of the one after it."""
        number = self.attempt + 1 if later else self.attempt
        return next((event for event in self.events if (event["event"], event.get("attempt")) == (name, number)), None)

    @property
    def step(self) -> int | None:
        """The step at which all ranks agreed to stop."""
        step = (self.event("signal") or {}).get("step")
        return step if isinstance(step, int) else None


def checks(seen: Evidence) -> list[Check]:
    """Every question, in the order in which a preemption would ask them. What cannot be known of a program that
    never joined the run is not asked."""
    signal, requeued = seen.event("signal"), seen.event("requeued")
    answers = [_heard(seen, signal)]
    if seen.joined:
        answers += [_saved(seen), _whole(seen)]
    answers.append(_requeued(seen, requeued))
    answers.append(_started(seen))
    if seen.joined:
        answers += [_resumed(seen), _went_on(seen)]
    return answers


def times_s(seen: Evidence) -> dict[str, float]:
    """Seconds from the telling to each thing that was seen. Machines whose clocks differ shift them."""
    started = seen.event("started", later=True) or {}
    stamps = {
        "heard": seen.event("signal"),
        "saved": seen.event("checkpoint_saved"),
        "requeued": seen.event("requeued"),
        "started": started,
        "resumed": seen.event("resumed", later=True),
        "first_step": seen.first_beat,
    }
    found = {name: epoch_s((record or {}).get("time")) for name, record in stamps.items()}
    allocated_s = (started.get("detail") or {}).get("allocated_s")
    if isinstance(allocated_s, (int, float)):
        found["allocated"] = allocated_s
    return {name: round(stamp - seen.told_s, 3) for name in _ORDER if (stamp := found.get(name)) is not None}


def _heard(seen: Evidence, signal: Mapping[str, Any] | None) -> Check:
    if signal is None:
        return Check(name="heard", ok=False, text="no rank noticed the signal")
    at = "" if seen.step is None else f"; all ranks agreed to stop after step {seen.step}"
    return Check(name="heard", ok=True, text=f"{signal.get('reason')}{at}")


def _saved(seen: Evidence) -> Check:
    saved, failed = seen.event("checkpoint_saved"), seen.event("checkpoint_failed")
    if saved is None:
        why = "no checkpoint was saved" if failed is None else f"the save failed: {failed.get('reason')}"
        return Check(name="saved", ok=False, text=why)
    ok = seen.step is not None and saved.get("step") == seen.step
    return Check(name="saved", ok=ok, text=f"step {saved.get('step')} in {format_seconds(saved.get('seconds', 0.0))}")


def _whole(seen: Evidence) -> Check:
    if seen.checkpoint is None:
        return Check(name="whole", ok=False, text="there was no checkpoint to verify")
    ranks, reason = seen.checkpoint
    if reason is not None:
        return Check(name="whole", ok=False, text=f"the checkpoint cannot be used: {reason}")
    text = f"every byte verifies; {ranks} of {seen.num_ranks} ranks are in it"
    return Check(name="whole", ok=ranks == seen.num_ranks, text=text)


def _requeued(seen: Evidence, requeued: Mapping[str, Any] | None) -> Check:
    if requeued is None:
        held = _first(seen.events, "held", "failed", "cancelled", "completed")
        ended = "" if held is None else f": {held['event']} ({held.get('reason', 'no reason')})"
        return Check(name="requeued", ok=False, text=f"the run did not go back to the queue{ended}")
    ok = not seen.joined or requeued.get("step") == seen.step
    at = f" at step {requeued['step']}" if "step" in requeued else ""
    return Check(name="requeued", ok=ok, text=f"{requeued.get('reason')}{at}")


def _started(seen: Evidence) -> Check:
    started = seen.event("started", later=True)
    if started is None:
        return Check(name="started", ok=False, text=f"attempt {seen.attempt + 1} was not seen to start")
    allocated_s = times_s(seen).get("allocated")
    since = "" if allocated_s is None else f", whose nodes it got after {format_seconds(max(0.0, allocated_s))}"
    return Check(name="started", ok=True, text=f"attempt {seen.attempt + 1}{since}")


def _resumed(seen: Evidence) -> Check:
    resumed = seen.event("resumed", later=True)
    if resumed is None:
        return Check(name="resumed", ok=False, text="it did not take up the work")
    ok = seen.step is not None and resumed.get("step") == seen.step
    return Check(name="resumed", ok=ok, text=f"from step {resumed.get('step')}")


def _went_on(seen: Evidence) -> Check:
    if seen.first_beat is None:
        return Check(name="went on", ok=False, text="no step was seen after it")
    lost = seen.lost_steps
    text = f"step {seen.first_beat.get('step')} came next; {'some' if lost is None else lost} steps lost"
    return Check(name="went on", ok=lost == 0, text=text)


def _first(events: Iterable[Mapping[str, Any]], *names: str) -> Mapping[str, Any] | None:
    return next((event for event in events if event["event"] in names), None)
