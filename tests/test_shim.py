"""Signals past whatever stands between a wrapper and its ranks: real processes, a launcher that kills on TERM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import make_folder, make_spec

from cfe_hpc.process import start_ticks
from cfe_hpc.ranks.pids import VARIABLE, Roster
from cfe_hpc.ranks.signals import STOP_SIGNALS

# A rank that joins after a while, writes down what it hears, and ends on the second signal.
RANK = """
import os, signal, sys, time
from pathlib import Path
from cfe_hpc.ranks.pids import register
from cfe_hpc.ranks.signals import block
place = Path(sys.argv[1]) / f"rank-{os.environ['LOCAL_RANK']}"
heard = []
def hear(number, frame):
    heard.append(signal.Signals(number).name)
    with open(place, "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, hear)
time.sleep(float(sys.argv[2]))
register()
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
place.with_suffix(".up").touch()
while "SIGUSR2" not in heard:
    time.sleep(0.01)
block()  # Python that has begun to end dies of what comes twice
"""

# What torchrun and deepspeed do when they are told to end.
LAUNCHER = """
import os, signal, subprocess, sys
ranks = []
def end(number, frame):
    for rank in ranks:
        rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
for local_rank in range(2):
    ranks.append(subprocess.Popen(sys.argv[1:], env={**os.environ, "LOCAL_RANK": str(local_rank)}))
sys.exit(max(rank.wait() for rank in ranks))
"""

WRAPPER = """
import os, sys, time
from cfe_hpc.ranks.child import Child
child = Child(sys.argv[2:], os.environ, launcher=sys.argv[1] == "launcher")
while (status := child.poll()) is None:
    time.sleep(0.01)
print(",".join(child.seen), status)
"""


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Wrapped:
    """A wrapper at work, in a process group of its own with all that it starts."""

    def __init__(self, folder: Path, kind: str, *argv: str) -> None:
        self.folder = folder
        (folder / "wrapper.py").write_text(WRAPPER)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "wrapper.py"), kind, *argv],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def up(self, *local_ranks: int) -> None:
        for rank in local_ranks:
            wait_for((self.folder / f"rank-{rank}.up").exists, f"rank {rank} up")

    def heard(self, local_rank: int) -> list[str]:
        path = self.folder / f"rank-{local_rank}"
        return path.read_text().split() if path.exists() else []

    def end(self) -> str:
        return self.process.communicate(timeout=60)[0].strip()


Wrap = Callable[..., Wrapped]


@pytest.fixture
def wrap(tmp_path: Path) -> Iterator[Wrap]:
    """wrap(kind, argv…): a wrapper that runs argv, a "launcher" or a "program"."""
    running: list[Wrapped] = []
    for name, text in (("rank.py", RANK), ("launcher.py", LAUNCHER)):
        (tmp_path / name).write_text(text)

    def begin(kind: str, *argv: str) -> Wrapped:
        running.append(Wrapped(tmp_path, kind, *argv))
        return running[-1]

    yield begin
    for wrapped in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(wrapped.process.pid, signal.SIGKILL)
        wrapped.process.communicate()


def rank_words(folder: Path, delay_s: float = 0.0) -> list[str]:
    return [sys.executable, str(folder / "rank.py"), str(folder), str(delay_s)]


def test_a_signal_to_the_wrapper_alone_reaches_every_rank_once(wrap: Wrap, tmp_path: Path) -> None:
    wrapped = wrap("launcher", sys.executable, str(tmp_path / "launcher.py"), *rank_words(tmp_path))
    wrapped.up(0, 1)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        wrapped.process.send_signal(number)
        time.sleep(0.05)
    # The launcher's status is 0: it never heard of it.
    assert wrapped.end() == "SIGTERM,SIGUSR1,SIGUSR2 0"
    assert [wrapped.heard(rank) for rank in range(2)] == [["SIGTERM", "SIGUSR1", "SIGUSR2"]] * 2


def test_a_launcher_is_deaf_where_the_whole_tree_is_signalled(wrap: Wrap, tmp_path: Path) -> None:
    wrapped = wrap("launcher", sys.executable, str(tmp_path / "launcher.py"), *rank_words(tmp_path))
    wrapped.up(0, 1)
    os.killpg(wrapped.process.pid, signal.SIGTERM)
    os.killpg(wrapped.process.pid, signal.SIGUSR2)
    assert wrapped.end().endswith(" 0")
    assert all(set(wrapped.heard(rank)) == {"SIGTERM", "SIGUSR2"} for rank in range(2))


def test_a_rank_that_registers_late_gets_what_came_before(wrap: Wrap, tmp_path: Path) -> None:
    wrapped = wrap("launcher", sys.executable, str(tmp_path / "launcher.py"), *rank_words(tmp_path, 1.0))
    # As soon as the wrapper handles it: before, Python would end.
    wait_for(lambda: handles(wrapped.process.pid, signal.SIGUSR2), "handlers")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        wrapped.process.send_signal(number)
    assert wrapped.end().endswith(" 0")
    assert all(set(wrapped.heard(rank)) == {"SIGTERM", "SIGUSR2"} for rank in range(2))


def test_a_shell_in_between_is_passed_over(wrap: Wrap, tmp_path: Path) -> None:
    script = 'export LOCAL_RANK=0; "$@"; sleep 0.2; echo the shell goes on'
    wrapped = wrap("program", "sh", "-c", script, "sh", *rank_words(tmp_path))
    wrapped.up(0)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        wrapped.process.send_signal(number)
        time.sleep(0.05)
    assert wrapped.end().splitlines() == ["the shell goes on", "SIGTERM,SIGUSR2 0"]
    assert wrapped.heard(0) == ["SIGTERM", "SIGUSR2"]


def test_a_shell_that_dies_of_the_signal_is_not_the_end_of_its_rank(wrap: Wrap, tmp_path: Path) -> None:
    wrapped = wrap("program", "sh", "-c", 'export LOCAL_RANK=0; "$@"; true', "sh", *rank_words(tmp_path))
    wrapped.up(0)
    shell = children(wrapped.process.pid)[0]
    os.kill(shell, signal.SIGTERM)
    wait_for(lambda: start_ticks(shell) is None, "the shell has ended")
    time.sleep(0.2)
    assert wrapped.process.poll() is None
    wrapped.process.send_signal(signal.SIGUSR2)
    assert wrapped.end() == f"SIGUSR2 {-signal.SIGTERM}"


def test_a_program_that_never_joined_gets_each_signal_once(wrap: Wrap, tmp_path: Path) -> None:
    # Through env -u it knows no wrapper to register with.
    wrapped = wrap("program", "env", "-u", VARIABLE, "LOCAL_RANK=0", *rank_words(tmp_path))
    wrapped.up(0)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
        wrapped.process.send_signal(number)
        time.sleep(0.05)
    assert wrapped.end() == "SIGTERM,SIGUSR2 0"
    assert wrapped.heard(0) == ["SIGTERM", "SIGUSR2"]


def test_ranks_do_not_outlive_their_launcher_nor_that_its_wrapper(wrap: Wrap, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.py"
    rank = "import os, sys, time; from cfe_hpc.ranks.child import die_with_parent; die_with_parent(); "
    rank += "open(sys.argv[1] + os.environ['LOCAL_RANK'], 'w').close(); time.sleep(600)"
    wrapped = wrap("launcher", sys.executable, str(launcher), sys.executable, "-c", rank, str(tmp_path / "up"))
    wait_for(lambda: all((tmp_path / f"up{rank}").exists() for rank in range(2)), "both ranks")
    (launching,) = children(wrapped.process.pid)
    below = [launching, *children(launching)]
    wrapped.process.kill()
    wait_for(lambda: all(start_ticks(pid) is None for pid in below), "all gone")


def test_a_launcher_that_has_gone_leaves_no_ranks(wrap: Wrap, tmp_path: Path) -> None:
    wrapped = wrap("launcher", sys.executable, str(tmp_path / "launcher.py"), *rank_words(tmp_path))
    wrapped.up(0, 1)
    (launching,) = children(wrapped.process.pid)
    ranks = children(launching)
    os.kill(launching, signal.SIGKILL)
    assert wrapped.end() == f"{-signal.SIGKILL}"
    wait_for(lambda: all(start_ticks(pid) is None for pid in ranks), "all gone")


def test_a_process_that_took_over_the_number_of_a_rank_is_never_signalled() -> None:
    roster = Roster()
    with open(roster.path, "a") as file:
        file.write(f"0 {os.getpid()} 1\n1 {2**22 + 1} 5\n")
    assert not roster.tell(["SIGKILL"])
    assert roster.living() == 0


def test_the_shim_becomes_the_command_with_its_place_and_logs(tmp_path: Path) -> None:
    show = "import os; print(os.environ['RANK'], os.environ['CFE_RANK'], os.environ['MASTER_PORT'], os.getcwd())"
    job = {"command": [sys.executable, "-c", show + "; print(open('/proc/self/status').read())", "{params.x}"]}
    spec = make_spec(tmp_path, job={**job, "params": {"x": "$$"}}, nodes=2, devices_per_node=2)
    folder = make_folder(tmp_path, spec)
    shim(tmp_path, folder.path, TORCHELASTIC_RESTART_COUNT="1")
    said, status = (folder.logs / "77.4.3.out").read_text().split("\n", 1)
    assert said == f"3 3 29000 {tmp_path}"
    assert not signals_in(status, "SigBlk") & set(STOP_SIGNALS)
    (degraded,) = [event for event in folder.events() if event["event"] == "degraded"] or [None]
    assert degraded is None  # rank 0 tells of it


def test_the_shim_becomes_the_rank_of_an_entry_with_stop_signals_held_back(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    lines = ["import os, sys", "print(*sys.argv[1:])", "print(open('/proc/self/status').read())"]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "RESTART", "CONTROL_PORT", "WORKER")
    lines += [f"print([os.environ['CFE_' + name] for name in {names!r}])"]
    fake.write_text("\n".join([f"#!{sys.executable}", *lines, ""]))
    fake.chmod(0o755)
    spec = make_spec(tmp_path, job={"command": None, "entry": "a:b"}, python=str(fake), nodes=2, devices_per_node=2)
    folder = make_folder(tmp_path, spec)
    # deepspeed's word for it
    shim(tmp_path, folder.path, RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE=None, LOCAL_SIZE="2",
         TORCHELASTIC_RESTART_COUNT="2", CFE_NODE_RANK="0")  # fmt: skip
    text = (folder.logs / "77.4.0.out").read_text().splitlines()
    assert text[0] == f"-u -m cfe_hpc.ranks {folder.path}"
    assert text[-1] == str(["0", "0", "4", "2", "0", "2", "31002", "1"])
    assert set(STOP_SIGNALS) <= signals_in("\n".join(text), "SigBlk")
    (degraded,) = [event for event in folder.events() if event["event"] == "degraded"]
    assert (degraded["reason"], degraded["detail"]) == ("restarted", {"restart": 2})


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, job={"command": ["no-such-program"]}, nodes=2, devices_per_node=2)
    folder = make_folder(tmp_path, spec)
    shim(tmp_path, folder.path, status=127)
    (failed,) = folder.events()
    assert (failed["event"], failed["rank"]) == ("failed", 3)
    assert failed["reason"] == "no-such-program: No such file or directory"


def shim(cwd: Path, run_dir: Path, status: int = 0, **changes: str | None) -> None:
    """Run the shim as torchrun would on the second of two nodes with two ranks each, stop signals blocked."""
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": "29000", "CFE_CONTROL_PORT": "31000", "CFE_NODE_RANK": "1", "CFE_NUM_NODES": "2"}
    place |= {"CFE_HOSTS": "n1,n2", "CFE_JOB_ID": "77", "CFE_ATTEMPT": "4", "CFE_SCHEDULER": "slurm"}
    roster = Roster()
    wanted = {**os.environ, **place, "CFE_RUN_DIR": str(run_dir), VARIABLE: roster.path, **changes}
    done = subprocess.run(
        [sys.executable, "-m", "cfe_hpc.ranks.shim"],
        cwd=cwd,
        env={name: value for name, value in wanted.items() if value is not None},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS),
        timeout=60,
        check=False,
    )
    assert done.returncode == status


def signals_in(status: str, field: str) -> set[int]:
    """Signals in a line such as SigBlk of /proc/PID/status."""
    (line,) = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    return {number for number in range(1, 65) if int(line.split()[1], 16) >> (number - 1) & 1}


def handles(pid: int, number: int) -> bool:
    return number in signals_in(Path(f"/proc/{pid}/status").read_text(), "SigCgt")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
