"""What must have become of a run that was hurt: every difference from it, as a sentence."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spine.harness import LiveRun

from chaos.kinds import kind
from chaos.plan import INTERVAL, STEPS, RunPlan
from chaos.ward import Delivered, Ward

__all__ = ["lost_steps", "orphans", "problems"]


def problems(ward: Ward, undisturbed: str | None) -> list[str]:
    """Everything about a run that is not as its plan predicts; empty when all is well.

    Args:
        undisturbed: digest of the weights that the training comes to when nobody hurts it; None where none is known.
    """
    run, plan = ward.run, ward.plan
    found = [*_end(run, plan, ward.delivered, undisturbed), *_reasons(run, ward.delivered), *_steps(run, ward)]
    if pids := orphans(run.folder.path):
        found.append(f"processes are left: {pids}")
    if run.job_id in ward.cluster.job_ids():
        found.append(f"job {run.job_id} is left in the queue")
    return found


def _end(run: LiveRun, plan: RunPlan, delivered: list[Delivered], undisturbed: str | None) -> Iterator[str]:
    result: dict[str, Any] = run.folder.result() or {"state": "none"}
    if len(delivered) < len(plan.faults):
        yield f"only {len(delivered)} of {len(plan.faults)} faults came before its end"
    if plan.held_by is not None:
        reason = str(result.get("reason"))
        if result["state"] != "HELD" or f"(recovery.{plan.held_by})" not in reason:
            yield f"is {result['state']} ({reason}) and not held by recovery.{plan.held_by}"
        return
    if (result["state"], result.get("final_step")) != ("COMPLETED", STEPS):
        yield f"is {result['state']} at step {result.get('final_step')} ({result.get('reason')})"
        return
    if plan.workload == "bulky" and result["metrics"]["total"] != sum(range(STEPS)):
        yield f"a step was skipped or done twice: total {result['metrics']['total']:g}"
    skipped = any(each.fault.kind == "nan" for each in delivered)
    if plan.workload == "training" and not skipped and undisturbed not in (None, result["weights_sha256"]):
        yield "the weights are not those of a run that nobody hurt"


def _reasons(run: LiveRun, delivered: list[Delivered]) -> Iterator[str]:
    told = {event["attempt"]: event["reason"] for event in run.events("requeued")}
    for each in delivered:
        expected = kind(each.fault.kind).reasons
        reason = told.get(each.attempt)
        # What kills a node may leave nobody to say so.
        silent = reason is None and kind(each.fault.kind).node
        if reason not in expected and expected and not silent and not _held_there(run, each.attempt):
            yield f"attempt {each.attempt} was requeued for {reason}, not for {' or '.join(sorted(expected))}"


def _held_there(run: LiveRun, attempt: int) -> bool:
    return any(event["attempt"] == attempt for event in run.events("held"))


def _steps(run: LiveRun, ward: Ward) -> Iterator[str]:
    by_attempt = {each.attempt: kind(each.fault.kind) for each in ward.delivered if kind(each.fault.kind).reasons}
    for attempt, lost in lost_steps(run).items():
        cause = by_attempt.get(attempt)
        allowed = 0 if cause is not None and cause.grace else INTERVAL
        if lost > allowed:
            yield f"{lost} steps of attempt {attempt} were lost, where {allowed} may be ({cause and cause.name})"
        if cause is None:
            yield f"attempt {attempt} ended though no fault was to end it"
    for event in run.events("rolled_back"):
        if event["detail"]["undone"] > INTERVAL:
            yield f"{event['detail']['undone']} steps were undone, where {INTERVAL} may be"


def lost_steps(run: LiveRun) -> dict[int, int]:
    """Of each attempt that another one followed, the steps it did beyond what that one took up from."""
    last: dict[int, int] = {}
    for beat in run.folder.heartbeats():
        last[beat["attempt"]] = beat["step"]
    resumed = {event["attempt"]: event["step"] for event in run.events("resumed")}
    numbers = sorted(event["attempt"] for event in run.events("started"))
    return {
        before: max(0, last.get(before, 0) - resumed.get(after, 0)) for before, after in itertools.pairwise(numbers)
    }


def orphans(folder: Path) -> list[int]:
    """Processes of a run, by its folder in their words or their environment."""
    mark, found = os.fsencode(folder), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
