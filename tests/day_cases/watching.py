"""Looking at runs of the real Slurm: one question for all of them, the live screen, logs over a requeue."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from spine.harness import cfe, site_file
from spine.stage import STEPS, Stage, ended
from terminal import Terminal

LONG = {"steps": 4000, "pause_s": 0.15, "variant": "a"}
SELDOM = {"every_steps": 100_000}


def one_question_about_all_runs(stage: Stage) -> None:
    site = site_file(stage.folder, slurm={"poll_interval": "60s"})  # longer than two looks take on a busy machine
    runs = [stage.submit("spot", site=site, params=LONG, words=("--set", "resources.time=12h")) for _ in range(3)]
    programs, calls = stage.folder / "bin", stage.folder / "calls"
    programs.mkdir()
    (programs / "squeue").write_text(f'#!/bin/sh\necho call >> {calls}\nexec {shutil.which("squeue")} "$@"\n')
    (programs / "squeue").chmod(0o755)
    env = {**stage.cluster.env, "PATH": f"{programs}{os.pathsep}{stage.cluster.env['PATH']}"}

    def asked(*words: str) -> str:
        done = cfe("status", *words, cwd=stage.folder, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = {one["run_id"]: one["state"] for one in json.loads(asked("--json"))}
    assert set(told) == {run.run_id for run in runs} and set(told.values()) <= {"PENDING", "RUNNING"}
    asked()
    assert calls.read_text().splitlines() == ["call"]
    # What a verb changes is seen at once.
    for run in runs:
        stage.cfe("cancel", run.run_id)
    for run in runs:
        ended(run, "CANCELLED")
    assert {one["state"] for one in json.loads(asked("--json"))} == {"CANCELLED"}


def accounting_tells_of_a_job_that_squeue_has_forgotten(stage: Stage) -> None:
    run = stage.submit("spot", params=LONG)
    run.wait(lambda: run.step() > 3, 90, "training")
    stage.cluster.scancel("--signal=KILL", "--full", run.job_id)
    stage.cluster.wait_for_end(run.job_id)
    programs = stage.folder / "bin"
    programs.mkdir()
    (programs / "squeue").write_text("#!/bin/sh\n")
    (programs / "squeue").chmod(0o755)
    env = {**stage.cluster.env, "PATH": f"{programs}{os.pathsep}{stage.cluster.env['PATH']}"}

    def told() -> bool:
        (status,) = json.loads(cfe("status", run.run_id, "--json", cwd=stage.folder, env=env).stdout)
        assert status["state"] == "CANCELLED" or status["reason"].startswith("vanished"), status
        return bool(status["state"] == "CANCELLED")

    # slurmctld hands its records on a little later.
    stage.cluster.wait_for(told, 60, "told by sacct")


def the_screen_saves_and_cancels_a_run(stage: Stage) -> None:
    run = stage.submit("spot", params=LONG, checkpoint=SELDOM)
    run.wait(lambda: run.step() > 3, 90, "training")
    argv = [sys.executable, "-m", "cfe_hpc", "watch"]
    with Terminal(argv, cwd=stage.folder, env=stage.cluster.env) as terminal:
        shown = terminal.wait_for("1 running", f"job {run.job_id}", "/4000", "spot ", timeout_s=60)
        assert stage.cluster.job(run.job_id)["NodeList"] in shown
        terminal.press("s")
        run.wait(lambda: run.events("checkpoint_saved"), 60, "saved")
        saved = run.events("checkpoint_saved")[0]["step"]
        run.wait(lambda: run.step() > saved + 3, 60, "trained on")
        assert (run.attempt(), len(run.events("checkpoint_saved"))) == (0, 1)
        terminal.press("l")
        terminal.wait_for(f"log of {run.run_id}", "0.0")
        terminal.press("\x1b")
        terminal.wait_for("1 running")
        terminal.press("c")
        terminal.wait_for(f"Cancel {run.run_id} for good?")
        terminal.press("y")
        terminal.wait_for("1 cancelled", timeout_s=60)
        terminal.press("q")
        assert terminal.wait_end() == 0
    assert ended(run, "CANCELLED")["final_step"] > saved


def logs_are_followed_over_a_requeue_to_the_end(stage: Stage) -> None:
    # It must not be done before two programs have started.
    run = stage.submit("spot", params={"steps": STEPS, "pause_s": 0.4, "variant": "a"})
    run.wait(lambda: run.step() > 3, 90, "training")
    follower = subprocess.Popen(
        [sys.executable, "-m", "cfe_hpc", "logs", "-f", run.run_id],
        cwd=stage.folder,
        env=stage.cluster.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        stage.cfe("requeue", run.run_id)
        stage.requeued(run, 1)
        printed, _ = follower.communicate(timeout=120)
    finally:
        follower.kill()
        follower.wait()
    marks = [line.split()[0] for line in printed.splitlines()]
    assert follower.returncode == 0 and {mark.strip("[!]") for mark in marks} == {"0.0", "1.0"}, printed
    assert marks == sorted(marks, key=lambda mark: mark[1])
    assert run.wait_result()["attempts"] == 2


CASES: list[Callable[[Stage], Any]] = [
    one_question_about_all_runs,
    accounting_tells_of_a_job_that_squeue_has_forgotten,
    the_screen_saves_and_cancels_a_run,
    logs_are_followed_over_a_requeue_to_the_end,
]
