"""From srun to a rank: the shield around start-up, the callable that becomes the rank, and squeue's answers."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import make_folder, make_spec

from cfe_hpc.launch.queue import parse
from cfe_hpc.launch.slurm import SlurmBackend
from cfe_hpc.launch.states import run_state
from cfe_hpc.launch.task import RankTask
from cfe_hpc.ranks.successor import clean_environment
from cfe_hpc.runfolder import RunFolder

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def signal_set(status: str, field: str) -> set[int]:
    """Signals in a line such as SigBlk of /proc/PID/status."""
    (line,) = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_a_stop_signal_does_not_kill_a_task_that_python_has_not_started_yet(tmp_path: Path) -> None:
    marker, fake = tmp_path / "there", tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ntouch {marker}\nsleep 1\necho survived\n")
    fake.chmod(0o755)
    spec = make_spec(tmp_path, scheduler="slurm", python=str(fake))
    script = SlurmBackend().preview(spec, RunFolder(tmp_path))
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    task = line[line.index("sh -c") :]  # SLURM_LOCALID is not set: nobody looks for packages
    process = subprocess.Popen(["bash", "-c", f"exec {task}"], stdout=subprocess.PIPE, text=True)
    try:
        while not marker.exists():
            time.sleep(0.01)
        for number in STOP:
            process.send_signal(number)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (printed, process.returncode) == ("survived\n", 0)


def test_the_task_becomes_the_rank_with_its_logs_and_stop_signals_held_back(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    # No shell: dash lets blocked signals in when it starts.
    lines = ["import os, sys", "print(os.getcwd(), *sys.argv[1:])", "print(open('/proc/self/status').read())"]
    fake.write_text("\n".join([f"#!{sys.executable}", *lines, "print('to-err', file=sys.stderr)", ""]))
    fake.chmod(0o755)
    workdir = tmp_path / "work dir"
    workdir.mkdir()
    folder = make_folder(tmp_path, make_spec(workdir, scheduler="slurm", python=str(fake)))
    pickled = pickle.dumps(RankTask(str(folder.path)))
    assert len(pickled) < 100 + len(str(folder.path))
    program = f"import pickle; pickle.loads({pickled!r})(); print('still here')"
    place = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "CFE_ATTEMPT_BASE": "1", "SLURM_PROCID": "5"}
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **place}, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said, status = (folder.logs / "7.3.5.out").read_text().split("\n", 1)
    assert said == f"{workdir} -u -m cfe_hpc.ranks {folder.path}"
    assert set(STOP) <= signal_set(status, "SigBlk")
    assert (folder.logs / "7.3.5.err").read_text() == "to-err\n"


def test_squeue_words_are_translated_once() -> None:
    assert {word: run_state(word) for word in ("PENDING", "COMPLETING", "NODE_FAIL", "REQUEUE_HOLD", "NEW_WORD")} == {
        "PENDING": "PENDING",
        "COMPLETING": "RUNNING",
        "NODE_FAIL": "FAILED",
        "REQUEUE_HOLD": "HELD",
        "NEW_WORD": "UNKNOWN",
    }
    assert run_state("PENDING", "launch_failure_limit_exceeded_requeued_held") == "HELD"


def test_squeue_lines_are_read_whatever_the_reason_holds() -> None:
    printed = (
        "11|RUNNING|2026-01-01T00:00:00|n[1-2]|None\n"
        "12|PENDING|N/A||(ReqNodeNotAvail, UnavailableNodes:n1|n2)\n"
    )  # fmt: skip
    jobs = parse(printed)
    assert (jobs["11"].state, jobs["11"].nodes, jobs["11"].reason) == ("RUNNING", "n[1-2]", "")
    assert (jobs["12"].state, jobs["12"].start, jobs["12"].reason) == (
        "PENDING",
        None,
        "(ReqNodeNotAvail, UnavailableNodes:n1|n2)",
    )


def test_a_sender_keeps_nothing_of_its_own_job() -> None:
    environment = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "CFE_ENTRY_NOTE": "mine"}
    foreign = {"SLURM_JOB_ID": "1", "SBATCH_PARTITION": "x", "RANK": "0", "CFE_CONTROL_PORT": "1", "CFE_RUN_DIR": "/r"}
    foreign |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0", "LOCAL_SIZE": "2"}
    facts = ("ALLOCATED_S", "HOSTS", "PIDS", "RESTART", "SCHEDULER", "WORKER")
    foreign |= {f"CFE_{name}": "1" for name in facts}
    assert clean_environment({**environment, **foreign}) == environment
