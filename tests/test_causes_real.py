"""Causes of failures brought about for real on this machine: a rank goes wrong, and what follows is its cause's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import kill_quietly, pid_exists
from spine.harness import LiveRun, write_job

from cfe_hpc.data.build import BuildOptions, build_from_paths
from cfe_hpc.recovery.attempts import cause_of
from cfe_hpc.runfolder import RunFolder

pytestmark = pytest.mark.timeout(600)

AT_A_TIME = 4
STEPS = 12
TOTAL = sum(range(STEPS))
MEMORY = Path("/sys/fs/cgroup/memory")
MEMORY_LIMIT_BYTES = 400 << 20


def submit(
    folder: Path,
    entry: str,
    *,
    ranks: int = 1,
    wrong_rank: int = 0,
    cgroup: Path | None = None,
    recovery: dict[str, Any] | None = None,
    **params: Any,
) -> LiveRun:
    """Submit an entry of entries_causes, all of its processes inside a cgroup when one is given."""
    folder.mkdir()
    job = write_job(
        folder,
        name=folder.name,
        entry=f"entries_causes:{entry}",
        resources={"devices_per_node": ranks},
        checkpoint={"every_steps": 2},
        recovery=recovery,
        params={"steps": STEPS, "wrong_step": 5, "wrong_rank": wrong_rank, **params},
    )
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup / "cgroup.procs")] if cgroup is not None else []
    argv = [*enter, sys.executable, "-m", "cfe_hpc", "submit", str(job), "--site", "local", "--json"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return LiveRun(json.loads(done.stdout), folder, os.environ)


@contextmanager
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup that holds no more than a run needs."""
    folder = MEMORY / f"cfe-causes-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(MEMORY_LIMIT_BYTES))
        (folder / "memory.swappiness").write_text("0")
        yield folder
    finally:
        while left := (folder / "cgroup.procs").read_text().split():
            for pid in left:
                kill_quietly(int(pid))
            time.sleep(0.1)
        folder.rmdir()


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A filesystem of 64 KiB."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, timeout=30)


def damaged_tokens(folder: Path) -> Path:
    """A token file with one bit flipped among its tokens."""
    np.save(folder / "ids.npy", np.arange(20_000) % 251)
    path = folder / "tokens.h5"
    build_from_paths(
        path, [folder / "ids.npy"], options=BuildOptions(validation_fraction=0, max_document_tokens=1 << 30)
    )
    content = bytearray(path.read_bytes())
    content[content.index(bytes(range(200))) + 100] ^= 1
    path.write_bytes(content)
    return path


def out_of_host_memory(folder: Path, stack: ExitStack) -> LiveRun:
    cgroup = stack.enter_context(memory_cgroup())
    return submit(folder, "greedy", ranks=2, wrong_rank=1, cgroup=cgroup)


def damaged_data(folder: Path, stack: ExitStack) -> LiveRun:
    tokens = damaged_tokens(folder.parent)
    return submit(folder, "reading", recovery={"failures": 5}, always=True, data=str(tokens))


def full_disk(folder: Path, stack: ExitStack) -> LiveRun:
    return submit(folder, "writing", disk=str(stack.enter_context(small_disk(folder.parent / "small"))))


Start = Callable[[Path, ExitStack], LiveRun]

RUNS: dict[str, Start] = {
    "out_of_host_memory": out_of_host_memory,
    "out_of_device_memory": lambda folder, stack: submit(folder, "crowded"),
    "communication": lambda folder, stack: submit(folder, "cut_off", ranks=2, wrong_rank=1),
    "data": damaged_data,
    "full_disk": full_disk,
    "configuration": lambda folder, stack: submit(folder, "importing", recovery={"failures": 5}),
    "raised": lambda folder, stack: submit(folder, "raising", ranks=2, wrong_rank=1, recovery={"failures": 1}),
    "killed": lambda folder, stack: submit(folder, "killed", ranks=2, wrong_rank=1, recovery={"failures": 1}),
}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[LiveRun]]]:
    """The runs of the chosen tests, ended; a few at a time, begun with the first one that is asked for."""
    root = tmp_path_factory.mktemp("causes")
    names = [item.name.removeprefix("test_") for item in request.session.items if item.path == request.path]

    def outcome(name: str) -> LiveRun:
        with ExitStack() as stack:
            run = RUNS[name](root / name, stack)
            supervisor = int(run.job_id.removeprefix("local-"))
            try:
                run.wait_result()
                deadline_s = time.monotonic() + 60
                while pid_exists(supervisor):
                    assert time.monotonic() < deadline_s, f"not gone\n{run.diagnosis()}"
                    time.sleep(0.1)
            except BaseException:
                if pid_exists(supervisor):
                    kill_quietly(supervisor)
                raise
            return run

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(outcome, name) for name in names if name in RUNS}


@pytest.fixture
def run(request: pytest.FixtureRequest, outcomes: dict[str, Future[LiveRun]]) -> LiveRun:
    """The run that this test is named after."""
    return outcomes[request.node.name.removeprefix("test_")].result(timeout=550)


def went_on(run: LiveRun, cause: str) -> None:
    """One attempt failed of this cause, the next one did the rest."""
    result = run.folder.result() or {}
    assert (result["state"], result["attempts"], result["metrics"]["total"]) == ("COMPLETED", 2, TOTAL), run.diagnosis()
    assert [event["reason"] for event in run.events("requeued")] == [cause], run.diagnosis()


def ended(run: LiveRun, state: str, *, attempts: int) -> str:
    result = run.folder.result() or {}
    assert (result["state"], result["attempts"]) == (state, attempts), run.diagnosis()
    return str(result["reason"])


def failures(folder: RunFolder) -> list[tuple[str, int | None]]:
    return [(cause_of(event), event.get("rank")) for event in folder.events() if event["event"] == "failed"]


def test_out_of_host_memory(run: LiveRun) -> None:
    went_on(run, "oom_host")
    assert ("oom_host", 1) in failures(run.folder)


def test_out_of_device_memory(run: LiveRun) -> None:
    went_on(run, "oom_device")
    (event,) = [event for event in run.events("degraded") if event["reason"] == "micro_batch_halved"]
    assert (event["attempt"], event["detail"]) == (0, {"divisor": 2})


def test_communication(run: LiveRun) -> None:
    went_on(run, "communication")


def test_data(run: LiveRun) -> None:
    """The same error twice holds the run, with the line of the log that says why."""
    reason = ended(run, "HELD", attempts=2)
    assert reason.startswith("the same first error twice: DataError: ") and reason.count("is damaged") == 1
    (held,) = run.events("held")
    assert held["cause"] == "data"
    assert held["detail"]["log"] == f"logs/{run.job_id}.1.0.err"
    assert held["detail"]["line"].startswith("error: ") and "is damaged between tokens" in held["detail"]["line"]


def test_full_disk(run: LiveRun) -> None:
    reason = ended(run, "HELD", attempts=1)
    assert reason.startswith("full disk number 1; the job allows 0 (recovery.disk_fulls): OSError: ")
    (held,) = run.events("held")
    assert held["cause"] == "disk_full" and "No space left on device" in held["detail"]["line"]


def test_configuration(run: LiveRun) -> None:
    reason = ended(run, "FAILED", attempts=1)
    assert reason.startswith("configuration error, which no other attempt mends: ModuleNotFoundError: No module named")


def test_raised(run: LiveRun) -> None:
    went_on(run, "failed")
    assert ("failed", 1) in failures(run.folder)


def test_killed(run: LiveRun) -> None:
    went_on(run, "failed")
    words = [event["reason"] for event in run.events("failed")]
    assert "rank 1 was killed by SIGKILL" in words
