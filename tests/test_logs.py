"""`logs` on files as ranks leave them, and while they grow."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_specs import RUN_ID, run_spec

from cfe_hpc.cli.main import main
from cfe_hpc.reports import stamps
from cfe_hpc.reports.rank_logs import Follower
from cfe_hpc.reports.stamps import stamp_s
from cfe_hpc.runfolder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of two ranks and two attempts."""
    folder = RunFolder(tmp_path / RUN_ID)
    for path in (folder.logs, folder.control):
        path.mkdir(parents=True)
    run_spec().write(folder.run_toml)
    for attempt in (0, 1):
        for rank in (0, 1):
            stem = folder.logs / folder.log_stem(job_id="41_2", attempt=attempt, rank=rank)
            stem.with_name(stem.name + ".out").write_text(f"out {attempt} {rank}\n")
            stem.with_name(stem.name + ".err").write_text(f"err {attempt} {rank}\n")
    (folder.logs / "41.batch.out").write_text("not a rank's\n")
    return folder


def logs(capsys: pytest.CaptureFixture[str], folder: RunFolder, *words: str) -> str:
    assert main(["logs", str(folder.path), *words]) == 0
    return capsys.readouterr().out


def test_all_logs_merged(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(capsys, folder) == (
        "[0.0] out 0 0\n[0.0!] err 0 0\n[0.1] out 0 1\n[0.1!] err 0 1\n"
        "[1.0] out 1 0\n[1.0!] err 1 0\n[1.1] out 1 1\n[1.1!] err 1 1\n"
    )


def test_one_rank_one_attempt_and_both(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(capsys, folder, "--rank", "1") == "[0.1] out 0 1\n[0.1!] err 0 1\n[1.1] out 1 1\n[1.1!] err 1 1\n"
    assert logs(capsys, folder, "--attempt", "1", "--rank", "0") == "out 1 0\nerr 1 0\n"


def test_what_is_not_there_is_said(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(folder.path), "--rank", "7"]) == 2
    expected = f"error: {RUN_ID}: no such log; there are ranks 0 to 1 of attempts 0, 1\n"
    assert capsys.readouterr().err == expected
    for path in folder.logs.glob("41_2.*"):
        path.unlink()
    assert main(["logs", str(folder.path)]) == 2
    assert f"no rank has written a log yet; look into {folder.logs}/41.batch.out" in capsys.readouterr().err


def test_odd_bytes_and_progress_bars_are_readable(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    log = folder.logs / "41_2.0.0.out"
    log.write_bytes(b"10%\r20%\rdone\r\n\xff\xfe\nno end")
    assert logs(capsys, folder, "--rank", "0", "--attempt", "0") == "done\n\ufffd\ufffd\nno end\nerr 0 0\n"


def test_the_first_error_names_rank_and_host_and_shows_the_end_of_its_log(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs(capsys, folder, "--first-error") == f"{RUN_ID}: no attempt has reported an error\n"
    folder.append_event("failed", attempt=0, rank=0, host="n9", reason="OldError: long past")
    folder.append_event("failed", attempt=1, rank=0, host="n1", reason="RuntimeError: Connection closed by peer")
    folder.append_event("failed", attempt=1, rank=1, host="n2", reason="ValueError: the cause")
    (folder.logs / "41_2.1.1.err").write_text("".join(f"line {number}\n" for number in range(100)))
    first, *lines = logs(capsys, folder, "--first-error").splitlines()
    assert first.startswith("attempt 1, rank 1 on n2, 20") and first.endswith("Z: failure: ValueError: the cause")
    assert lines == [f"[1.1!] line {number}" for number in range(60, 100)]
    assert logs(capsys, folder, "--first-error", "--attempt", "0").startswith("attempt 0, rank 0 on n9")


def test_following_goes_across_a_requeue_until_the_run_ends(folder: RunFolder) -> None:
    argv = [sys.executable, "-m", "cfe_hpc", "logs", "-f", "--rank", "0", str(folder.path)]
    follower = subprocess.Popen(argv, stdout=subprocess.PIPE, bufsize=0)  # a buffer would keep lines from communicate
    try:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"[0.0] out 0 0\n"
        with open(folder.logs / "41_2.1.0.out", "a") as stream:
            stream.write("half a li")
            stream.flush()
            time.sleep(0.6)  # longer than its poll: it must have met the half line
            stream.write("ne\n")
        (folder.logs / "41_2.2.0.out").write_text("next attempt\nlast words")
        folder.write_result({"state": "COMPLETED"})
        rest, _ = follower.communicate(timeout=60)
    finally:
        follower.kill()
        follower.wait()
    assert follower.returncode == 0
    assert rest.decode().splitlines() == [
        "[0.0!] err 0 0",
        "[1.0] out 1 0",
        "[1.0!] err 1 0",
        "[1.0] half a line",
        "[2.0] next attempt",
        "[2.0] last words",
    ]


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The zone of lines that name none."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        stamps._minute_s.cache_clear()
        yield
    time.tzset()
    stamps._minute_s.cache_clear()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2026-01-31T10:00:00Z cfe_hpc [rank 0] INFO x", 1769853600.0),
        ("2026-01-31T10:00:00.250Z x", 1769853600.25),
        ("[2026-01-31 11:00:00,500+01:00] x", 1769853600.5),
        ("2026-01-31 10:00:00.123456+0000 | INFO", 1769853600.123456),
        ("[2026-01-31 10:00:00,123] [INFO] [engine.py:1:f] x", 1769853600.123),  # in the nodes' zone: UTC here
        ("[rank1]:[W131 10:00:00.5 x.cpp:1] no month of two digits", None),
        ("[rank1]:[W0131 10:00:00.500000000 ProcessGroup.cpp:1] x", 1769853600.5),
        ("E0131 10:00:00.000001 1 x.py:1] x", 1769853600.000001),
        ("the run of 2026-13-41 10:00:00 went wrong", None),
        ("step 3 loss 2.5", None),
        ("x" * 80 + " 2026-01-31T10:00:00Z", None),
        ("", None),
    ],
)
def test_when_a_line_was_written(line: str, expected: float | None, utc: None) -> None:
    found = stamp_s(line, year=2026)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def write(folder: RunFolder, attempt: int, rank: int, stream: str, *lines: str) -> Path:
    path = folder.logs / f"{folder.log_stem(job_id='41_2', attempt=attempt, rank=rank)}.{stream}"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_ranks_are_merged_by_time_and_each_keeps_its_order(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        folder, 0, 0, "out", "no stamp yet", "2026-01-31T10:00:02Z two", "of two", "2026-01-31T10:00:01Z a clock back"
    )
    write(folder, 0, 0, "err", "2026-01-31T10:00:03Z three", "Traceback", "  of three")
    write(folder, 0, 1, "out", "2026-01-31T10:00:01Z one", "2026-01-31T10:00:04Z four")
    write(folder, 0, 1, "err")
    for rank in (0, 1):
        write(folder, 1, rank, "out", f"2026-01-31T09:00:0{rank}Z another attempt")
        write(folder, 1, rank, "err")
    shown = [line.replace("2026-01-31T10:00:", "") for line in logs(capsys, folder).splitlines()]
    assert shown == [
        "[0.0] no stamp yet",
        "[0.1] 01Z one",
        "[0.0] 02Z two",
        "[0.0] of two",
        "[0.0] 01Z a clock back",
        "[0.0!] 03Z three",
        "[0.0!] Traceback",
        "[0.0!]   of three",
        "[0.1] 04Z four",
        "[1.0] 2026-01-31T09:00:00Z another attempt",
        "[1.1] 2026-01-31T09:00:01Z another attempt",
    ]


def test_what_comes_later_is_shown_later_whatever_it_says(folder: RunFolder) -> None:
    follower = Follower(folder)
    assert len(list(follower.news())) == 8
    for rank, second in ((0, 9), (1, 8)):
        with open(folder.logs / f"41_2.1.{rank}.out", "a") as stream:
            stream.write(f"2026-01-31T10:00:0{second}Z x\n")
    assert [log.rank for log, _ in follower.news()] == [1, 0]
    with open(folder.logs / "41_2.1.1.out", "a") as stream:
        stream.write("2026-01-31T10:00:00Z late\n")
    assert [line for _, line in follower.news()] == ["2026-01-31T10:00:00Z late"]


def test_there_may_be_more_ranks_than_open_files(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(150):
        write(folder, 2, rank, "out", *(f"2026-01-31T10:{minute:02d}:00Z {rank}" for minute in range(60)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        shown = logs(capsys, folder, "--attempt", "2").splitlines()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(shown) == 150 * 60
    assert shown == sorted(shown, key=lambda line: line.split(" ")[1])


def test_following_may_begin_near_the_end(folder: RunFolder) -> None:
    write(folder, 1, 0, "out", *(f"line {number}" for number in range(1000)))
    follower = Follower(folder, tail_bytes=100)
    lines = [(log.label, line) for log, line in follower.news()]
    assert lines[-1] == ("1.1!", "err 1 1") and {label[0] for label, _ in lines} == {"1"}
    of_rank = [line for label, line in lines if label == "1.0"]
    assert of_rank == [f"line {number}" for number in range(1000 - len(of_rank), 1000)] and 8 < len(of_rank) < 12
    write(folder, 2, 0, "out", "a new attempt")
    assert [line for _, line in follower.news()] == ["a new attempt"]


def test_an_error_that_nobody_reported_is_looked_for_in_the_logs(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    job = {"job_id": f"local-{gone.pid}", "scheduler": "local", "pid": gone.pid, "start_ticks": 1}
    folder.promise("job", **job, host=socket.gethostname(), attempt_base=0)
    folder.append_event("started", attempt=1, host="n1", detail={"job_id": "41_2"})
    write(folder, 1, 1, "err", "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB")
    first, why, *lines = logs(capsys, folder, "--first-error").splitlines()
    assert first.startswith("attempt 1, rank 1: ") and "CUDA out of memory" in first
    assert why.startswith(f"{RUN_ID}: vanished")
    assert lines == ["[1.1!] RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"]


def test_a_sweep_has_no_log_of_its_own(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.sweep_json.write_text("{}")
    assert main(["logs", str(folder.path)]) == 2
    assert capsys.readouterr().err == f"error: {RUN_ID}: is a sweep; name one of its tasks: {RUN_ID}.0\n"
