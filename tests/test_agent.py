"""A node's agent: the command lines of its launcher, and an attempt under one from its start to its end.

The launcher of the runs here is a stand-in for torchrun of a few lines, which takes no second to load; the real ones
are in tests/recovery_cases/launch.py.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import events, make_folder, make_spec, pid_exists

from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.site import Preemption
from cfe_hpc.ranks import launchers
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.launchers import launch_words, shutdown_timeout_s
from cfe_hpc.ranks.rendezvous import Meeting
from cfe_hpc.runfolder import RunFolder

MEETING = Meeting(address="10.0.0.1", master_port=29001, control_port=31001)

# Starts its ranks as torchrun does, and ends them as torchrun does: TERM, and KILL if they do not end.
TORCHRUN = """
import os, signal, subprocess, sys
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
argv = sys.argv[sys.argv.index("--no-python") + 1:]
if "FAKE_RANK" in os.environ:
    argv = [sys.executable, os.environ["FAKE_RANK"]]
count, node = int(words["nproc-per-node"]), int(words["node-rank"])
def started(restart):
    ranks = []
    for local in range(count):
        place = {"RANK": node * count + local, "LOCAL_RANK": local, "WORLD_SIZE": count * int(words["nnodes"])}
        place |= {"LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RESTART_COUNT": restart}
        place |= {"MASTER_ADDR": words["master-addr"], "MASTER_PORT": words["master-port"]}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        ranks.append(subprocess.Popen(argv, env=environment))
    return ranks
def end(number=None, frame=None):
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        try:
            rank.wait(float(words["shutdown-timeout"]) if number is None else 0.5)
        except subprocess.TimeoutExpired:
            rank.kill()
    if number is not None:
        sys.exit(1)
signal.signal(signal.SIGTERM, end)
for restart in range(int(words["max-restarts"]) + 1):
    ranks = started(restart)
    while True:
        pid, status = os.wait()
        next(rank for rank in ranks if rank.pid == pid).returncode = os.waitstatus_to_exitcode(status)
        if status:
            end()
            break
        if all(rank.returncode == 0 for rank in ranks):
            sys.exit(0)
sys.exit(1)
"""


def agent_facts(*, nodes: int = 2, node: int = 1) -> RankFacts:
    return RankFacts(
        scheduler="slurm",
        rank=node,
        local_rank=0,
        world_size=nodes,
        local_world_size=1,
        node_rank=node,
        num_nodes=nodes,
        hosts=tuple(f"n{k}" for k in range(nodes)),
        job_id="7",
        attempt=3,
    )


def spec_of(tmp_path: Path, launcher: str, **plan: object) -> RunSpec:
    return make_spec(tmp_path, python="/py", launcher=launcher, tasks_per_node=1, nodes=2, devices_per_node=4, **plan)


def words_of(spec: RunSpec, **environ: str) -> dict[str, str]:
    """The launcher's words by their names, those without a value with an empty one; all that follows as "rest"."""
    words = launch_words(spec, agent_facts(), MEETING, environ, scratch=Path("/tmp/x"))
    cut = next(k for k, word in enumerate(words) if word in ("--no-python", "--no_python"))
    assert words[:2] == ["/py", "-m"]
    named = dict(word.partition("=")[::2] for word in words[2:cut])
    return {**named, "rest": " ".join(words[cut + 1 :])}


def test_torchrun_is_told_the_place_and_leaves_its_ranks_as_long_as_the_site_may(tmp_path: Path) -> None:
    preemption = Preemption(mode="requeue", grace=90.5)
    spec = spec_of(tmp_path, "torchrun", signal_lead_s=30, preemption=preemption, restarts=2)
    assert shutdown_timeout_s(spec) == 171  # the grace, kill_wait's 20 s, and a minute
    assert words_of(spec) == {
        "torch.distributed.run": "",
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--node-rank": "1",
        "--master-addr": "10.0.0.1",
        "--master-port": "29001",
        "--max-restarts": "2",
        "--log-dir": "/tmp/x",
        "--shutdown-timeout": "171",
        "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        "rest": "/py -u -m cfe_hpc.ranks.shim",
    }


def test_an_older_torchrun_is_given_no_option_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = frozenset({"--nnodes", "--signals-to-handle"})
    monkeypatch.setattr(launchers, "_torchrun_options", lambda: known)
    words = words_of(spec_of(tmp_path, "torchrun"))
    assert "--shutdown-timeout" not in words and "--signals-to-handle" in words


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("4,5,6,7", [4, 5, 6, 7]),
        ("", [0, 1, 2, 3]),
        ("GPU-ab,GPU-cd,GPU-ef,GPU-gh", [0, 1, 2, 3]),
        ("1,2", [0, 1, 2, 3]),
    ],
)
def test_deepspeed_is_told_the_place_and_the_devices_that_are_the_jobs(
    tmp_path: Path, visible: str, devices: list[int]
) -> None:
    words = words_of(spec_of(tmp_path, "deepspeed"), CUDA_VISIBLE_DEVICES=visible)
    world = json.loads(base64.urlsafe_b64decode(words.pop("--world_info") + "=="))
    assert world == {"node0": devices, "node1": devices}
    assert words == {
        "deepspeed.launcher.launch": "",
        "--node_rank": "1",
        "--master_addr": "10.0.0.1",
        "--master_port": "29001",
        "--no_local_rank": "",
        "rest": "/py -u -m cfe_hpc.ranks.shim",
    }


Start = Callable[..., tuple[RunFolder, "subprocess.Popen[bytes]"]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(program, job=…, **plan): a supervisor whose agents start 2 x 2 ranks of `program` through the stand-in."""
    fake = tmp_path / "fake" / "torch" / "distributed"
    fake.mkdir(parents=True)
    for package in (fake, fake.parent):
        (package / "__init__.py").touch()
    (fake / "run.py").write_text(f'"""Knows "--shutdown-timeout", "--log-dir"."""\n{TORCHRUN}')
    running: list[subprocess.Popen[bytes]] = []

    def begin(program: str, **changes: object) -> tuple[RunFolder, subprocess.Popen[bytes]]:
        (tmp_path / "program.py").write_text(program)
        job = {"command": [sys.executable, str(tmp_path / "program.py")], **changes.pop("job", {})}  # type: ignore[dict-item]
        plan = {"nodes": 2, "devices_per_node": 2, "tasks_per_node": 1, "launcher": "torchrun", **changes}
        folder = make_folder(tmp_path, make_spec(tmp_path, job=job, **plan))
        argv = [sys.executable, "-m", "cfe_hpc.launch.supervisor", str(folder.path)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "fake"), "CFE_RUN_DIR": str(folder.path)}
        with open(folder.logs / "supervisor.log", "ab") as log:
            running.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log, start_new_session=True))
        return folder, running[-1]

    yield begin
    for process in running:
        process.kill()  # ranks never outlive it
        process.wait()


def wait_for(condition: Callable[[], object], folder: RunFolder, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        said = "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.logs.iterdir()))
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


# Never heard of cfe_hpc; the first attempt waits to be told.
UNTIL_TOLD = """
import os, signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "attempt", os.environ["CFE_ATTEMPT"], flush=True)
while os.environ["CFE_ATTEMPT"] == "0" and not heard:
    time.sleep(0.02)
time.sleep(1)  # longer than the launcher would leave it
print("told" if heard else "not told", flush=True)
"""


def test_a_command_under_a_launcher_is_stopped_and_goes_on(start: Start) -> None:
    folder, supervisor = start(UNTIL_TOLD, preemption=Preemption(mode="requeue", grace=30))
    logs = [folder.logs / f"local-{supervisor.pid}.0.{rank}.out" for rank in range(4)]
    wait_for(lambda: all(log.exists() and log.read_text() for log in logs), folder)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=60) == 0
    for rank, log in enumerate(logs):
        assert log.read_text() == f"rank {rank} of 4 attempt 0\ntold\n"
        again = log.with_name(f"local-{supervisor.pid}.1.{rank}.out")
        assert again.read_text() == f"rank {rank} of 4 attempt 1\nnot told\n"
    assert (folder.result() or {})["state"] == "COMPLETED"
    assert [event["reason"] for event in events(folder, "requeued")] == ["preempted"]
    assert [event["detail"]["world_size"] for event in events(folder, "started")] == [4, 4]
    assert not list(Path(tempfile.gettempdir()).glob("cfe-job-2026*"))
    # Each node has said how its launcher ended: well, for it has heard of nothing.
    notes = [json.loads(path.read_text()) for path in folder.control.glob("exit-0.*")]
    assert [(note["status"], note["signals"]) for note in notes] == [(0, ["SIGTERM"])] * 2


def test_a_command_that_fails_under_a_launcher_is_started_again_in_place_and_counted(start: Start) -> None:
    program = "import os, sys; sys.exit(os.environ['RANK'] == '1' and os.environ['CFE_RESTART'] == '0')"
    folder, supervisor = start(program, nodes=1, restarts=1)
    assert supervisor.wait(timeout=60) == 0
    assert (folder.result() or {})["state"] == "COMPLETED"
    assert [event["detail"] for event in events(folder, "degraded")] == [{"restart": 1}]
    assert len(events(folder, "started")) == 1


def test_a_launcher_that_fails_is_named_with_its_node(start: Start) -> None:
    folder, supervisor = start("import os, sys; sys.exit(os.environ['RANK'] == '1')", nodes=1)
    assert supervisor.wait(timeout=60) == 1
    assert (folder.result() or {})["state"] == "FAILED"
    failed = events(folder, "failed")[0]
    assert (failed["reason"], failed["host"]) == ("torchrun: exit status 1", "localhost")


def test_ranks_of_an_entry_that_wait_for_one_that_failed_are_killed_after_kill_wait(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of the shim: one fails, the other is deaf to all that the launcher says.
    fake = "import os, signal, sys, time; from pathlib import Path; from cfe_hpc.ranks.pids import register\n"
    fake += "signal.signal(signal.SIGTERM, signal.SIG_IGN); register()\n"
    fake += "Path(os.environ['CFE_RUN_DIR'], 'control', 'pid-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
    fake += "while len(list(Path(os.environ['CFE_RUN_DIR'], 'control').glob('pid-*'))) < 2: time.sleep(0.02)\n"
    fake += "sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)\n"
    monkeypatch.setenv("FAKE_RANK", str(tmp_path / "program.py"))
    folder, supervisor = start(fake, nodes=1, kill_wait_s=0.5, job={"command": None, "entry": "a:b"})
    assert supervisor.wait(timeout=60) == 1
    assert (folder.result() or {})["state"] == "FAILED"
    pids = [int(path.read_text()) for path in folder.control.glob("pid-*")]
    assert len(pids) == 2 and not any(map(pid_exists, pids))
    assert "the others do not end: killed" in (folder.logs / f"local-{supervisor.pid}.0.node0.err").read_text()
