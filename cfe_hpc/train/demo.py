"""`python -m cfe_hpc.train.demo`: train, stop on a real SIGTERM halfway, go on, and show that nothing was lost."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfe_hpc import process
from cfe_hpc.errors import CfeError, RunFailed
from cfe_hpc.runfolder import RunFolder

__all__ = ["main"]

JOB = "train_seq"
GOAL_NATS = 2.2
POLL_S = 0.5
TELL_EVERY_S = 10.0
# fp32: processors without bf16 instructions would be many times slower in the job's own precision.
OVERRIDES = ("engine.precision=fp32",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A run on its way: its folder, and the process that plays the scheduler."""

    folder: RunFolder
    supervisor_pid: int


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the run ended as it should; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `cfe-hpc submit`")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="give up after so long (900)")
    args = parser.parse_args(argv)
    began_s = time.monotonic()
    try:
        with _submitted([*OVERRIDES, *args.set]) as run:
            deadline_s = began_s + args.timeout
            total = _total_steps(run.folder, deadline_s)
            _wait_for_step(run.folder, total // 2, deadline_s)
            print(f"--- SIGTERM to the supervisor (pid {run.supervisor_pid}), as a scheduler preempts ---", flush=True)
            os.kill(run.supervisor_pid, signal.SIGTERM)
            result = _wait_for_end(run.folder, deadline_s)
    except CfeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failures = _failures(run.folder, result)
    _summarise(run.folder, result, seconds=time.monotonic() - began_s)
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


@contextlib.contextmanager
def _submitted(overrides: Sequence[str]) -> Iterator[Submitted]:
    """Submit the job to this machine; whatever happens, nothing keeps running afterwards."""
    settings = [word for setting in overrides for word in ("--set", setting)]
    submit = [sys.executable, "-m", "cfe_hpc", "submit", JOB, "--site", "local", "--json", *settings]
    facts = json.loads(process.run(submit, timeout_s=120).stdout)
    folder = RunFolder(Path(facts["run_dir"]))
    print(f"submitted {folder.run_id} as {facts['job_id']}: {folder.path}", flush=True)
    try:
        yield Submitted(folder=folder, supervisor_pid=int(facts["job_id"].removeprefix("local-")))
    finally:
        if folder.result() is None:
            process.run([sys.executable, "-m", "cfe_hpc", "cancel", str(folder.path)], timeout_s=60)


def _total_steps(folder: RunFolder, deadline_s: float) -> int:
    """Steps of the run, as its ranks announce when they are up."""
    while True:
        for event in folder.events():
            if event["event"] == "started":
                return int(event["detail"]["total_steps"])
        _pause(folder, deadline_s)


def _wait_for_step(folder: RunFolder, step: int, deadline_s: float) -> None:
    told_s = 0.0
    while True:
        newest = _newest(folder)
        if newest.get("step", 0) >= step:
            return
        told_s = _tell(newest, told_s)
        _pause(folder, deadline_s)


def _wait_for_end(folder: RunFolder, deadline_s: float) -> dict[str, Any]:
    told_s = 0.0
    while (result := folder.result()) is None:
        told_s = _tell(_newest(folder), told_s)
        if time.monotonic() > deadline_s:
            raise RunFailed(f"{folder.run_id} did not end in time; its logs are in {folder.logs}")
        time.sleep(POLL_S)
    return result


def _pause(folder: RunFolder, deadline_s: float) -> None:
    if folder.result() is not None or time.monotonic() > deadline_s:
        raise RunFailed(f"{folder.run_id} ended, or took too long, before it was halfway; see {folder.logs}")
    time.sleep(POLL_S)


def _tell(newest: dict[str, Any], told_s: float) -> float:
    """Print how far the run is, once in a while; when that was last done."""
    now_s = time.monotonic()
    if "loss" not in newest or now_s - told_s < TELL_EVERY_S:
        return told_s
    print(f"attempt {newest['attempt']}  step {newest['step']:4d}  loss {newest['loss']:.3f}", flush=True)
    return now_s


def _newest(folder: RunFolder) -> dict[str, Any]:
    beats = deque(folder.heartbeats(), maxlen=1)
    return beats[0] if beats else {}


def _failures(folder: RunFolder, result: dict[str, Any]) -> list[str]:
    """What is not as it should be, in words."""
    metrics = result.get("metrics", {})
    last, resumed = metrics.get("val_loss", float("inf")), [e for e in folder.events() if e["event"] == "resumed"]
    expectations = {
        f"the run ended {result['state']}: {result.get('reason', 'no reason given')}": result["state"] == "COMPLETED",
        f"{result.get('lost_steps')} steps were lost": result.get("lost_steps") == 0,
        f"validation loss {last:.3f} is not below {GOAL_NATS}": last < GOAL_NATS,
        f"{len(resumed)} attempts resumed, 1 was expected": len(resumed) == 1,
    }
    return [failure for failure, good in expectations.items() if not good]


def _summarise(folder: RunFolder, result: dict[str, Any], *, seconds: float) -> None:
    beats = list(folder.heartbeats())
    metrics = result.get("metrics", {})
    first, last = (metrics.get(name, float("nan")) for name in ("first_val_loss", "val_loss"))
    stops = [event for event in folder.events() if event["event"] in ("preempted", "resumed")]
    rate = len(beats) / sum(beat["step_seconds"] for beat in beats) if beats else 0.0
    rows = {
        "state": result["state"],
        "steps": result.get("final_step"),
        "attempts": result.get("attempts"),
        "stopped and resumed": ", ".join(f"{event['event']} at step {event.get('step')}" for event in stops),
        "lost steps": result.get("lost_steps"),
        "validation loss, nats": f"{first:.3f} before, {last:.3f} after",
        "steps per second": f"{rate:.2f}",
        "weights": f"sha256 {result.get('weights_sha256')}",
        "run folder": folder.path,
        "seconds in all": f"{seconds:.0f}",
    }
    print()
    for name, value in rows.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    sys.exit(main())
