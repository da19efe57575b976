"""What a user does to a run: cancel, requeue; and the job that follows one that its partition cancels."""

from __future__ import annotations

import json
import subprocess
import sys

from spine.stage import Stage, reasons

from cfe_hpc.launch.jobs import all_jobs

# Ends on the first signal, and at once in every attempt but the first.
UNTIL_TOLD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
attempt = int(os.environ.get("CFE_ATTEMPT_BASE", "0")) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
print("up", flush=True)
time.sleep(0 if attempt else 600)
"""

SEND = (
    "import sys; from pathlib import Path; from cfe_hpc.runfolder import RunFolder\n"
    "from cfe_hpc.ranks.successor import submit_successor\n"
    "print(submit_successor(RunFolder(Path(sys.argv[1])), job_id=sys.argv[2], next_attempt=4))"
)


def cancel_ends_waiting_and_running_runs_for_good(stage: Stage) -> None:
    first = stage.submit("gpu", command=[sys.executable, "-c", UNTIL_TOLD])
    second = stage.submit("gpu", command=["true"], words=("--after", first.job_id))
    assert "afterok" in stage.cluster.job(second.job_id)["Dependency"]
    first.wait(lambda: first.events("started"), 60, "started")
    assert json.loads(stage.cfe("cancel", second.job_id, "--json").stdout)["action"] == "cancelled"
    assert (second.folder.result() or {})["state"] == "CANCELLED"
    assert second.events("cancelled")
    stage.cfe("cancel", str(first.folder.path))
    assert stage.cluster.wait_for_end(first.job_id) == "CANCELLED"
    assert first.wait_result(30)["state"] == "CANCELLED"
    assert "ended before: CANCELLED" in stage.cfe("cancel", first.job_id).stdout
    refused = stage.cfe("requeue", first.job_id, status=2).stderr
    assert "a cancelled run is never requeued" in refused
    assert stage.cluster.restarts(first.job_id) == 0


def requeue_sends_a_running_run_back_to_the_queue(stage: Stage) -> None:
    run = stage.submit("gpu", command=[sys.executable, "-c", UNTIL_TOLD])
    run.wait(lambda: "up" in run.log("out"), 60, "up")
    assert json.loads(stage.cfe("requeue", run.job_id, "--json").stdout)["action"] == "signalled"
    stage.requeued(run, 1)
    assert stage.cluster.wait_for_end(run.job_id) == "COMPLETED"
    assert reasons(run) == ["requeue_requested"]


def requeue_goes_on_with_a_failed_run_as_a_new_job(stage: Stage) -> None:
    fails_once = "import os, sys; sys.exit(int(os.environ['CFE_ATTEMPT_BASE'] == '0'))"
    run = stage.submit("gpu", command=[sys.executable, "-c", fails_once])
    assert run.wait_result(60)["state"] == "FAILED"
    outcome = json.loads(stage.cfe("requeue", run.run_id, "--json").stdout)
    assert outcome["action"] == "resubmitted"
    assert stage.cluster.wait_for_end(outcome["job_id"]) == "COMPLETED"
    assert [job["job_id"] for job in all_jobs(run.folder)] == [run.job_id, outcome["job_id"]]
    assert (run.folder.logs / f"{outcome['job_id']}.1.0.out").exists()
    assert (run.folder.result() or {})["state"] == "COMPLETED"


def a_run_that_its_partition_cancels_goes_on_in_a_successor(stage: Stage) -> None:
    run = stage.submit("spot-cancel", command=[sys.executable, "-c", UNTIL_TOLD])
    run.wait(lambda: "up" in run.log("out"), 60, "up")
    preemptor = stage.cluster.preempt(run.job_id)
    successor = run.wait(lambda: run.folder.promised("job-1"), 60, "followed by a successor")["job_id"]
    stage.cluster.wait_for_end(run.job_id)
    stage.cluster.scancel(preemptor)
    assert stage.cluster.wait_for_end(successor) == "COMPLETED"
    assert (run.folder.logs / f"{successor}.1.0.out").read_text() == "up\n"
    assert (run.folder.result() or {})["state"] == "COMPLETED"


def a_successor_inherits_nothing_of_the_step_that_sends_it(stage: Stage) -> None:
    show = "import os; print(os.environ.get('SBATCH_PARTITION'), os.environ['CFE_ATTEMPT_BASE'], os.environ['RANK'])"
    run = stage.submit("gpu", command=[sys.executable, "-c", show])
    stage.cluster.wait_for_end(run.job_id)
    step = {"SBATCH_PARTITION": "none", "RANK": "77", "SLURM_NTASKS": "9", "CFE_ATTEMPT_BASE": "5"}
    sent = subprocess.run(
        [sys.executable, "-c", SEND, str(run.folder.path), run.job_id],
        env={**stage.cluster.env, **step},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert sent.returncode == 0, sent.stderr
    successor = sent.stdout.strip()
    assert stage.cluster.wait_for_end(successor) == "COMPLETED"
    assert (run.folder.logs / f"{successor}.4.0.out").read_text() == "None 4 0\n"


CASES = [
    a_run_that_its_partition_cancels_goes_on_in_a_successor,
    requeue_sends_a_running_run_back_to_the_queue,
    cancel_ends_waiting_and_running_runs_for_good,
    requeue_goes_on_with_a_failed_run_as_a_new_job,
    a_successor_inherits_nothing_of_the_step_that_sends_it,
]
