"""`logs` on files as ranks leave them, and while they grow."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_specs import RUN_ID, run_spec

from cfe_hpc.cli.main import main
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
