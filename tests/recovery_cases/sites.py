"""Drills on a real Slurm: of a run that survives them, and of a program that hears nothing."""

from __future__ import annotations

import json
import sys
from typing import Any

from spine.harness import LiveRun
from spine.stage import Stage, reasons

LONG = {"steps": 2000, "pause_s": 0.1, "variant": "a"}
DEAF = """
import signal, time
for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


def a_drill_passes(stage: Stage) -> None:
    run = stage.submit("spot", nodes=2, params=LONG)
    run.wait_step(2, attempt=0)
    for attempt, way in enumerate(((), ("--direct",))):
        report = _drill(stage, run, *way, status=0)
        assert report["passed"] and report["attempt"] == attempt, report
        checks = [check["name"] for check in report["checks"]]
        assert checks == ["heard", "saved", "whole", "requeued", "started", "resumed", "went on"]
        times = report["times_s"]
        assert list(times) == ["heard", "saved", "requeued", "allocated", "started", "resumed", "first_step"]
        assert sorted(times.values()) == list(times.values())
    assert reasons(run) == ["requeue_requested", "requeue_requested"]
    stage.cfe("cancel", run.run_id)


def a_drill_of_a_deaf_program_fails(stage: Stage) -> None:
    run = stage.submit("spot", command=[sys.executable, "-c", DEAF])
    run.wait(lambda: "up" in run.log("out"), 60, "up")
    report = _drill(stage, run, status=1, timeout="4s")
    assert {check["name"]: check["ok"] for check in report["checks"]}["requeued"] is False, report
    assert stage.cluster.state(run.job_id) == "RUNNING"
    stage.cfe("cancel", run.run_id)


def _drill(stage: Stage, run: LiveRun, *words: str, status: int, timeout: str = "100s") -> dict[str, Any]:
    done = stage.cfe("drill", run.run_id, "--json", "--timeout", timeout, *words, status=status)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


CASES = [a_drill_passes, a_drill_of_a_deaf_program_fails]
