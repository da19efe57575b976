"""From srun to a rank: the shield around start-up, the file that becomes the rank, and squeue's answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import make_folder, make_spec

from cfe_hpc.launch.preparation import starter
from cfe_hpc.launch.queue import parse
from cfe_hpc.launch.slurm import SlurmBackend
from cfe_hpc.launch.states import run_state
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
    program = f"export CFE_LOG={tmp_path}/log. SLURM_PROCID=0; exec {line[line.index('sh -c') :]}"
    process = subprocess.Popen(["bash", "-c", program])
    try:
        while not marker.exists():
            time.sleep(0.01)
        for number in STOP:
            process.send_signal(number)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert ((tmp_path / "log.0.out").read_text(), process.returncode) == ("survived\n", 0)


def test_the_task_becomes_the_rank_with_its_logs_and_stop_signals_held_back(tmp_path: Path) -> None:
    workdir = tmp_path / "work dir"
    (workdir / "beside").mkdir(parents=True)
    lines = ["import os, sys", "print(os.getcwd(), *sys.argv[1:], sys.path[0], __name__)"]
    lines += ["print(open('/proc/self/status').read())", "print('to-err', file=sys.stderr)"]
    (workdir / "beside" / "__init__.py").touch()
    (workdir / "beside" / "__main__.py").write_text("\n".join(lines))
    spec = make_spec(workdir, scheduler="slurm", python=sys.executable)
    folder = make_folder(tmp_path, spec)
    folder.starter.write_text(starter(spec))
    script = SlurmBackend().preview(spec, folder).splitlines()
    (srun,) = [line for line in script if line.startswith("srun ")]
    exports = [line for line in script if line.startswith(("export CFE_LOG", "export CFE_RUN_DIR"))]
    task = srun[srun.index("sh -c") :].replace("cfe_hpc.ranks", "beside")
    place = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "CFE_ATTEMPT_BASE": "1", "SLURM_PROCID": "5"}
    program = "\n".join([*exports, f"exec {task}"])
    done = subprocess.run(["bash", "-c", program], env={**os.environ, **place}, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said, status = (folder.logs / "7.3.5.out").read_text().split("\n", 1)
    assert said == f"{workdir} {folder.path} {workdir} __main__"
    assert set(STOP) <= signal_set(status, "SigBlk") and not set(STOP) & signal_set(status, "SigIgn")
    assert (folder.logs / "7.3.5.err").read_text() == "to-err\n"


def test_a_task_says_what_the_node_lacks_before_anything_is_loaded(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, scheduler="slurm", job={"entry": "no_such_module:train"})
    folder = make_folder(tmp_path, spec)
    folder.starter.write_text(starter(spec))
    words = [sys.executable, str(folder.starter), "cfe_hpc.ranks", str(folder.path)]
    place = {"CFE_RUN_DIR": str(folder.path), "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}
    done = subprocess.run(words, env={**os.environ, **place}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78 and "lacks no_such_module" in done.stderr
    (event,) = folder.events()
    assert (event["event"], event["cause"]) == ("failed", "configuration") and "no_such_module" in event["reason"]


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
    facts = ("ALLOCATED_S", "LOG", "HOSTS", "PIDS", "RESTART", "SCHEDULER", "WORKER")
    foreign |= {f"CFE_{name}": "1" for name in facts}
    assert clean_environment({**environment, **foreign}) == environment
