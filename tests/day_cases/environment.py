"""What a node needs before ranks start, on the real Slurm: the code of submission, containers, and what is missing.

Containers' programs stand in at the border: they do with their options what the real ones do to the process that
follows, and take away what an image does not have.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from spine.harness import LiveRun
from spine.stage import Stage, ended

PATH = os.environ["PATH"]

# Says what it is made of; its first attempt waits to be told to end.
VERSIONED = """
import os, signal, sys, time, parts
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
attempt = int(os.environ["CFE_ATTEMPT_BASE"]) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
print("version", parts.VERSION, open("data/input.txt").read(), flush=True)
time.sleep(0 if attempt else 600)
"""

UNTIL_TOLD = """
import os, shutil, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
status = subprocess.run(["scontrol", "ping"], capture_output=True).returncode
print("inside", os.environ["INSIDE"], "slurm", status, os.getcwd(), flush=True)
attempt = int(os.environ["CFE_ATTEMPT_BASE"]) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
time.sleep(0 if attempt else 600)
"""

APPTAINER = """#!/bin/bash
[ "$1 $2" = "exec --pwd" ] || exit 9
cd -- "$3"; shift 3
while [ "${1#-}" != "$1" ]; do options="$options $1"; shift; done
export INSIDE="$(basename "$1")"; shift
unset SLURM_CONF
exec "$@"
"""

# Hands on only the variables that it is told of, and starts in the image's own folder.
ENROOT = """#!/bin/bash
[ "$1" = start ] || exit 9
shift; keep=(PATH="$PATH")
while [ "${1#-}" != "$1" ]; do
    [ "$1" = --env ] && { [ "$2" = SLURM_CONF ] || keep+=("$2=${!2}"); shift; }
    shift
done
shift; cd / && exec env -i "${keep[@]}" INSIDE=enroot "$@"
"""

PYXIS = """#!/bin/bash
[ "$1" = --help ] && { echo "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"; exit 0; }
words=()
for word in "$@"; do case "$word" in --container-*) echo "$word" >>"$ASKED" ;; *) words+=("$word") ;; esac; done
INSIDE=pyxis exec SRUN "${words[@]}"
"""


def programs(stage: Stage, **texts: str) -> dict[str, str]:
    """Programs in a folder of their own; the variables that put it first on the path."""
    folder = stage.folder / "programs"
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{PATH}"}


def submit(stage: Stage, command: str, environment: dict[str, Any]) -> LiveRun:
    return stage.submit("gpu", command=[sys.executable, "-c", command], environment=environment)


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *words], check=True)


def the_code_of_submission_runs_in_every_attempt(stage: Stage) -> None:
    (stage.folder / "parts.py").write_text("VERSION = 1\n")
    (stage.folder / "work.py").write_text(VERSIONED)
    (stage.folder / ".gitignore").write_text("data/\n")
    (stage.folder / "data").mkdir()
    (stage.folder / "data" / "input.txt").write_text("early")
    git(stage.folder, "init", "-q")
    git(stage.folder, "add", "-A")
    git(stage.folder, "commit", "-q", "-m", "code")
    (stage.folder / "parts.py").write_text("VERSION = 2\n")
    run = stage.submit("gpu", command=[sys.executable, "work.py"])
    (stage.folder / "parts.py").write_text("VERSION = broken\n")
    run.wait(lambda: "version" in run.log("out"), 60, "up")
    (stage.folder / "data" / "input.txt").write_text("late")
    stage.cfe("requeue", run.run_id)
    stage.requeued(run, 1)
    assert run.wait_result(120)["state"] == "COMPLETED", run.diagnosis()
    first, second = (line.split() for line in run.log("out").splitlines() if line.startswith("version"))
    assert first[:2] == second[:2] == ["version", "2"], run.diagnosis()
    assert second[2] == "late"  # data is reached, not copied


def ranks_in_a_container_are_requeued_from_outside(stage: Stage) -> None:
    image = stage.folder / "torch.sif"
    image.touch()
    variables = programs(stage, apptainer=APPTAINER)
    container = {"kind": "apptainer", "image": str(image)}
    run = submit(stage, UNTIL_TOLD, {"container": container, "variables": variables, "python": sys.executable})
    run.wait(lambda: "inside" in run.log("out"), 60, "up")
    assert f"inside torch.sif slurm 1 {stage.folder}" in run.log("out")  # nothing of Slurm's answers in there
    stage.cfe("requeue", run.run_id)
    stage.requeued(run, 1)
    assert run.wait_result(120)["state"] == "COMPLETED", run.diagnosis()


def pyxis_and_enroot_get_their_own_words(stage: Stage) -> None:
    asked = stage.folder / "asked"
    srun = shutil.which("srun")
    variables = programs(stage, srun=PYXIS.replace("SRUN", str(srun)), enroot=ENROOT) | {"ASKED": str(asked)}
    says = "import os; print('inside', os.environ['INSIDE'], os.environ['OMP_NUM_THREADS'], os.getcwd())"
    for kind in ("pyxis", "enroot"):
        container = {"kind": kind, "image": "nvcr.io#torch:1", "mounts": ["/etc:/mnt:ro"]}
        run = submit(stage, says, {"container": container, "variables": variables, "python": sys.executable})
        assert run.wait_result(120)["state"] == "COMPLETED", run.diagnosis()
        assert f"inside {kind} 1 {stage.folder}" in run.log("out"), run.diagnosis()
    options = dict(line.split("=", 1) for line in asked.read_text().split())
    assert options["--container-image"] == "nvcr.io#torch:1"
    assert options["--container-mounts"].endswith(",/etc:/mnt:ro")
    assert f"{stage.folder}:{stage.folder}" in options["--container-mounts"].split(",")


def what_a_node_lacks_ends_the_run_in_one_line(stage: Stage) -> None:
    bare = f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n'  # no packages
    modules = "#!/bin/sh\necho \"ERROR: Unable to locate a modulefile for '$2'\" >&2\nexit 1\n"
    variables = programs(stage, module=modules, python=bare)
    python = str(stage.folder / "programs" / "python")
    image = str(stage.folder / "none.sif")
    lacking: list[tuple[dict[str, Any], str]] = [
        ({"modules": ["cuda/99"]}, "environment.modules: cannot be loaded on n"),
        ({"venv": str(stage.folder / "none")}, f"environment.venv: {stage.folder}/none/bin/python is no program on n"),
        ({"python": python}, "environment.python: lacks cfe_hpc, pydantic on n"),
        ({"container": {"kind": "apptainer", "image": image}}, f"environment.container.image: {image} is not there"),
    ]
    programs(stage, apptainer=APPTAINER)
    # A second node that is another than the first.
    elsewhere = f'#!/bin/sh\n[ "$SLURM_NODEID" != 1 ] || set -- -I -S "$@"\nexec {sys.executable} "$@"\n'
    programs(stage, elsewhere=elsewhere)
    other = {"python": str(stage.folder / "programs" / "elsewhere"), "variables": variables}
    two = stage.submit("gpu", nodes=2, command=["true"], environment=other)
    runs = [submit(stage, "print('never')", {**environment, "variables": variables}) for environment, _ in lacking]
    for run, (_, words) in zip(runs, lacking, strict=True):
        reason = ended(run, "FAILED")["reason"]
        assert words in reason, run.diagnosis()
        assert [event["cause"] for event in run.events("failed")] == ["configuration"]
        assert not run.events("started", "requeued")
        assert stage.status(run)["state"] == "FAILED"
    reason, (failed, *_) = ended(two, "FAILED")["reason"], two.events("failed")
    assert f"environment.python: lacks cfe_hpc, pydantic on {failed['host']}" in reason, two.diagnosis()
    assert failed["cause"] == "configuration"


CASES = [
    the_code_of_submission_runs_in_every_attempt,
    ranks_in_a_container_are_requeued_from_outside,
    pyxis_and_enroot_get_their_own_words,
    what_a_node_lacks_ends_the_run_in_one_line,
]
