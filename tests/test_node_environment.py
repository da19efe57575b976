"""`[environment]`: which Python it means, what the scripts do with it, and what they say when a node lacks it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import make_spec, pid_exists

from cfe_hpc.config.load import Loaded, load
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import ConfigError
from cfe_hpc.launch.exporting import export_script
from cfe_hpc.launch.interpreter import interpreters
from cfe_hpc.launch.local import LocalBackend
from cfe_hpc.launch.slurm import SlurmBackend
from cfe_hpc.process import CommandError, run
from cfe_hpc.runfolder import RunFolder

RUN = "/runs/job/job-20260101-000000-abcd"


def site_profile(folder: Path, text: str) -> str:
    """A profile with this `[environment]`; its path."""
    head = 'name = "s"\nscheduler = "slurm"\ndefault_partition = "p"\n[partitions.p]\nhardware = "h"\n[hardware.h]\n'
    head += 'accelerator = "cpu"\ndevices_per_node = 1\ncores_per_node = 1\nmemory = "1GiB"\n[environment]\n'
    (folder / "site.toml").write_text(head + text)
    return str(folder / "site.toml")


def loaded(folder: Path, job: str = "", site: str = "") -> Loaded:
    (folder / "job.toml").write_text(f'name = "j"\ncommand = ["true"]\n[environment]\n{job}')
    return load(str(folder / "job.toml"), site_profile(folder, site), [], os.environ)


def test_a_job_states_its_own_over_the_sites(tmp_path: Path) -> None:
    site = 'modules = ["cuda"]\nvariables = { A = "site", B = "site" }\ncontainer = { kind = "enroot", image = "i" }\n'
    found = loaded(tmp_path, 'modules = []\nvariables = { A = "job" }\ncontainer = { image = "mine" }\n', site)
    environment = found.job.environment
    assert (environment.modules, environment.variables) == ([], {"A": "job", "B": "site"})
    assert (environment.container.kind, environment.container.image) == ("enroot", "mine")
    origins = {key: Path(found.origins[f"job.environment.{key}"]).name for key in ("modules", "container.kind", "venv")}
    assert origins == {"modules": "job.toml", "container.kind": "site.toml", "venv": "default"}


@pytest.mark.parametrize(
    ("job", "python", "outside"),
    [
        ("", sys.executable, None),
        ('venv = "$HOME/v"', f"{os.environ['HOME']}/v/bin/python", None),
        ('conda = "~/c"', f"{os.environ['HOME']}/c/bin/python", None),
        ('venv = "/v"\npython = "/p"', "/p", None),
        ('container = { kind = "enroot", image = "i" }', "python3", sys.executable),
        ('venv = "/v"\ncontainer = { kind = "enroot", image = "i" }', "/v/bin/python", sys.executable),
    ],
)
def test_the_interpreter_follows_from_the_environment(
    tmp_path: Path, job: str, python: str, outside: str | None
) -> None:
    assert interpreters(loaded(tmp_path, job)) == (python, outside)


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment.venv: variable NO_SUCH is not set \(\$NO_SUCH/v\); set it, or"):
        interpreters(loaded(tmp_path, 'venv = "$NO_SUCH/v"'))


def run_script(
    tmp_path: Path, environment: dict[str, Any], *, python: str = sys.executable, **variables: str
) -> tuple[RunFolder, str]:
    """Run the head of a Slurm job's script up to srun; its run folder, and what it said."""
    folder = RunFolder(tmp_path / "job" / "job-20260101-000000-abcd")
    for sub in (folder.logs, folder.control):
        sub.mkdir(parents=True)
    spec = make_spec(tmp_path, scheduler="slurm", job={"environment": environment}, python=python)
    spec.write(folder.run_toml)
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "srun").write_text(
        "#!/bin/sh\necho VIRTUAL_ENV=$VIRTUAL_ENV CONDA_PREFIX=$CONDA_PREFIX LOADED=$LOADED\n"
    )
    (programs / "srun").chmod(0o755)
    (tmp_path / "submission.sh").write_text(SlurmBackend().preview(spec, folder))
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / "submission.sh")],
        cwd=folder.path,
        env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n7", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return folder, done.stdout + done.stderr


MODULE = """
module() {
    [ "$2" = old ] && { echo "ModuleCmd_Load.c(213):ERROR:105: Unable to locate a modulefile for 'old'" >&2; return 0; }
    [ "$2" = new ] && { printf '\\nLmod has detected the following error: unknown: new\\n' >&2; return 1; }
    export LOADED="$LOADED $2"
}
"""


@pytest.fixture
def modules(tmp_path: Path) -> str:
    """A folder with what makes the command `module`, as sites have it."""
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text(MODULE)
    return str(tmp_path)


def test_modules_are_loaded_though_no_login_made_the_command_known(tmp_path: Path, modules: str) -> None:
    _, said = run_script(tmp_path, {"modules": ["gcc", "cuda/12 4"]}, MODULESHOME=modules)
    assert "LOADED= gcc cuda/12 4\n" in said or "LOADED=gcc cuda/12 4\n" in said, said


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("old", "ModuleCmd_Load.c(213):ERROR:105: Unable to locate a modulefile for 'old'"),  # 3.2 returns 0
        ("new", "Lmod has detected the following error: unknown: new"),
    ],
)
def test_a_module_that_cannot_be_loaded_ends_the_run(tmp_path: Path, modules: str, module: str, words: str) -> None:
    folder, said = run_script(tmp_path, {"modules": ["gcc", module]}, MODULESHOME=modules)
    why = f"job.toml: environment.modules: cannot be loaded on n7 ({module}): {words}; `module avail` there lists"
    assert f"error: {why}" in said
    result = folder.result()
    assert result is not None and result["state"] == "FAILED" and why in result["reason"]
    (failed,) = folder.events()
    assert (failed["cause"], failed["host"], failed["attempt"]) == ("configuration", "n7", 0)


def test_conda_scripts_are_sourced_and_the_environment_comes_first(tmp_path: Path) -> None:
    prefix = tmp_path / "env"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").symlink_to(sys.executable)
    scripts = prefix / "etc" / "conda" / "activate.d"
    scripts.mkdir(parents=True)
    (scripts / "a.sh").write_text("export LOADED=$(command -v python)\n")
    _, said = run_script(tmp_path, {"conda": str(prefix)})
    assert f"VIRTUAL_ENV= CONDA_PREFIX={prefix} LOADED={prefix}/bin/python\n" in said


def test_without_any_python_the_run_still_ends(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, job={"command": ["true"]}, python=str(tmp_path / 'no "py\\thon'))
    folder = RunFolder(tmp_path / "job-20260101-000000-abcd")
    folder.path.mkdir()
    script = LocalBackend().preview(spec, folder)
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "CFE_ATTEMPT_BASE": "2"}, timeout=30)
    assert done.returncode == 1
    result, (failed,) = folder.result(), folder.events()
    assert result is not None and (result["state"], result["attempts"]) == ("FAILED", 3)
    assert result["reason"] == failed["reason"]
    assert f'environment.python: {tmp_path}/no "py\\thon is no program on ' in result["reason"]
    assert (failed["run_id"], failed["attempt"], failed["cause"]) == (folder.run_id, 2, "configuration")


def tampered(tmp_path: Path, *, state: str, ends: str) -> tuple[RunFolder, str]:
    """The head of a job's script, when its look at the node `ends` like this, under a Slurm that says `state`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    interpreter = tmp_path / "python"
    ends = f'[ "$1" = -c ] || exec {sys.executable} "$@"; {ends}'
    for path, text in ((interpreter, ends), (programs / "scontrol", f"echo JobId=7 JobState={state} Requeue=1")):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return run_script(tmp_path, {}, python=str(interpreter))


@pytest.mark.parametrize("ends", ["kill -TERM $$", "echo error: lacks all; exit 78"])
def test_what_looks_at_a_node_that_is_ended_with_its_job_says_nothing_about_the_node(tmp_path: Path, ends: str) -> None:
    folder, _ = tampered(tmp_path, state="CANCELLED", ends=ends)
    assert (folder.result(), list(folder.events())) == (None, [])


def test_what_looks_at_a_node_and_is_killed_is_a_failure_of_its_own(tmp_path: Path) -> None:
    folder, said = tampered(tmp_path, state="RUNNING", ends="kill -KILL $$")
    assert "what looks at the node ended with status 137" in said
    result, (failed, *_) = folder.result(), folder.events()
    assert result is not None and result["state"] in ("FAILED", "HELD") and "status 137" in result["reason"]
    assert failed["cause"] != "configuration"


def test_a_snapshot_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = str(tmp_path / "snapshot")
    spec = make_spec(tmp_path)
    provenance = spec.provenance.model_copy(update={"snapshot": gone, "work_tree": str(tmp_path), "start_in": gone})
    folder = RunFolder(tmp_path / "job-20260101-000000-abcd")
    for sub in (folder.logs, folder.control):
        sub.mkdir(parents=True)
    spec = spec.model_copy(update={"provenance": provenance})
    spec.write(folder.run_toml)
    script = LocalBackend().preview(spec, folder)
    assert subprocess.run(["bash", "-c", script], timeout=30).returncode == 1
    result = folder.result()
    assert result is not None and result["state"] == "FAILED"
    assert f"{gone}: the snapshot of the code is not there on" in result["reason"]


@pytest.mark.parametrize(
    ("kind", "words"), [("apptainer", '"$cfe_container" exec'), ("pyxis", "srun '--container-image")]
)
def test_weights_are_exported_where_the_packages_are(kind: str, words: str) -> None:
    spec = container_spec(kind)
    checkpoint = spec.job.checkpoint.model_copy(update={"export_epochs": "bf16"})
    spec = spec.model_copy(update={"job": spec.job.model_copy(update={"checkpoint": checkpoint})})
    last = export_script(spec, RunFolder(Path(RUN)), log=["a", "b"]).splitlines()[-1]
    assert last.startswith(f"exec {words}") and f" python3 -m cfe_hpc checkpoints export {RUN} --epochs" in last


def test_what_has_completed_is_not_undone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "job-20260101-000000-abcd")
    folder.path.mkdir()
    make_spec(tmp_path).write(folder.run_toml)
    folder.write_result({"state": "COMPLETED"})
    argv = [sys.executable, "-m", "cfe_hpc.ranks.refusal", str(folder.path), "the export's node lacks a module", "1"]
    assert subprocess.run(argv, timeout=60).returncode == 0
    assert folder.result() == {"state": "COMPLETED"}


def srun_line(spec: RunSpec) -> str:
    script = SlurmBackend().preview(spec, RunFolder(Path(RUN)))
    (line,) = [line for line in script.splitlines() if line.startswith("srun --unbuffered")]
    return line


def container_spec(kind: str, **plan: Any) -> RunSpec:
    container = {"kind": kind, "image": "/i m/a.sif", "mounts": ["/data", "/t:/mnt:ro"], "options": ["--extra=1"]}
    return make_spec(
        Path("/work dir"), scheduler="slurm", python="python3", job={"environment": {"container": container}}, **plan
    )


def test_apptainer_gets_devices_and_mounts() -> None:
    line = srun_line(container_spec("apptainer", accelerator="cuda"))
    package = Path(__file__).resolve().parents[1]
    before, _, after = line.partition("""; trap "" TERM USR1 USR2; exec "$@"' sh """)
    assert "--container" not in before
    assert after.startswith(
        f""""$cfe_container" exec --pwd "$CFE_RUN_DIR" --nv --bind=/runs:/runs '--bind=/work dir:/work dir' """
        f"""--bind={package}:{package} --bind=/data:/data --bind=/t:/mnt:ro --extra=1 '/i m/a.sif' sh -c 'trap "" """
    )
    assert after.endswith('sh python3 -u "$CFE_RUN_DIR/start.py" cfe_hpc.ranks "$CFE_RUN_DIR"')
    assert "--nv" not in srun_line(container_spec("apptainer", accelerator="hpu"))


def test_pyxis_is_told_through_srun() -> None:
    line = srun_line(container_spec("pyxis"))
    assert "'--container-image=/i m/a.sif' '--container-mounts=/runs:/runs,/work dir:/work dir," in line
    assert f",/data:/data,/t:/mnt:ro' --extra=1 --container-workdir={RUN} sh -c " in line


@pytest.mark.parametrize(
    ("container", "scheduler", "words"),
    [
        ({"kind": "pyxis", "image": "i"}, "local", "environment.container.kind: is a plugin of Slurm's, and this site"),
        ({"kind": "enroot", "image": "$NO_SUCH"}, "slurm", "environment.container.image: variable NO_SUCH is not set"),
    ],
)
def test_containers_that_cannot_be_are_refused(
    tmp_path: Path, container: dict[str, Any], scheduler: str, words: str
) -> None:
    spec = make_spec(tmp_path, scheduler=scheduler, job={"environment": {"container": container}})
    with pytest.raises(ConfigError, match=words.replace("$", "\\$")):
        (LocalBackend() if scheduler == "local" else SlurmBackend()).preview(spec, RunFolder(tmp_path / "r"))


def test_a_path_that_no_mount_can_have_is_refused() -> None:
    container = {"kind": "apptainer", "image": "i"}
    spec = make_spec(Path("/a,b"), scheduler="slurm", job={"environment": {"container": container}})
    with pytest.raises(ConfigError, match=r"holds a sign that no mount can have .* \(/a,b\); rename the folder"):
        srun_line(spec)


@pytest.fixture
def relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A relay outside of a container, reached by `process.run` as it is from inside; its process id."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" "$CFE_ATTEMPT_BASE" "$RANK"; echo sorry >&2; exit 3\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RANK": "5"}
    holder = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -m cfe_hpc.ranks.relay; read line"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdin is not None
    words = dict(word.split("=", 1) for word in holder.stdout.readline().split()[1:])
    monkeypatch.setenv("CFE_RELAY", words["CFE_RELAY"])
    try:
        yield int(words["CFE_RELAY_PID"])
    finally:
        holder.stdin.close()
        holder.wait(timeout=30)
        holder.stdout.close()


def test_slurm_is_asked_outside_of_the_container(relay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(["scontrol", "show", "job"], timeout_s=10, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "show job  5\n", "sorry\n")
    with pytest.raises(CommandError, match="`scontrol requeue 7` failed with exit status 3: sorry"):
        run(["scontrol", "requeue", "7"], timeout_s=10)
    # A job that is sent from inside starts outside: of the environment only the number of its attempt is taken.
    sent = run(["scontrol", "x"], timeout_s=10, check=False, env={"CFE_ATTEMPT_BASE": "4", "PATH": "/inside"})
    assert sent.stdout == "x 4 \n"
    assert run(["echo", "here"], timeout_s=10).stdout == "here\n"
    port, _, token = os.environ["CFE_RELAY"].partition(":")
    monkeypatch.setenv("CFE_RELAY", f"{port}:{'0' * len(token)}")
    with pytest.raises(CommandError, match="scontrol: cannot be asked for outside of the container"):
        run(["scontrol", "ping"], timeout_s=10)
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as connection:
        asked = {"token": token, "argv": ["touch", "/x"], "timeout_s": 5, "stdin": None, "attempt_base": None}
        connection.sendall(json.dumps(asked).encode() + b"\n")
        assert b"is no command of Slurm's" in connection.makefile("rb").readline()
    assert pid_exists(relay)


def test_a_relay_ends_with_the_script_that_started_it() -> None:
    line = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m cfe_hpc.ranks.relay; exit 0"], capture_output=True, text=True, timeout=30
    ).stdout
    pid, deadline = int(line.rpartition("=")[2]), time.monotonic() + 20
    while pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
