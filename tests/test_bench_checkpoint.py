"""The benchmark of checkpoints runs, and says what it is there to say: at a tiny size, so its figures mean nothing."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
FULL = os.environ.get("CFE_TEST_FULL") == "1"
QUICKEST = ("cfe", "cfe-async", "cfe-overlap", "safetensors", "dcp", "dcp-async-thread-staging")
ASKED = ["--sizes", "0.005", "--ranks", "2", "--rounds", "1" if FULL else "0"]


def run(folder: Path, *words: str) -> tuple[dict, str]:
    file = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench_checkpoint", *words, "--folder", str(folder), "--json", str(file)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "tests" / "benchmarks")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    file.unlink()
    assert not list(folder.iterdir())
    return result, done.stdout


def test_every_way_has_its_figures_beside_the_limits_of_the_round(tmp_path: Path) -> None:
    result, text = run(tmp_path, *ASKED, *([] if FULL else ["--methods", ",".join(QUICKEST)]))
    for case in result["cases"]:
        assert not case["failed"], case["failed"]
        assert case["state_bytes"] > 3_000_000
        assert len(case["rounds"]) == (2 if FULL else 1)
        for way in case["ways"]:
            assert all(round_[way]["file_bytes"] > 0 for round_ in case["rounds"])
            row = case["summary"][way]
            assert 0 < row["blocked_s"]["median"] <= row["durable_s"]["median"] or "decoupled" in way
            assert f"\n{way} " in text
        if not case["zero"]:
            rows = case["summary"]
            assert rows["limits"].keys() == {"copy_s", "write_s", "read_s"}
            assert all(rows["limits"][key]["min"] > 0 for key in rows["limits"])
            assert rows["cfe"]["load / read"]["median"] > 0
            assert rows["cfe-async"]["slower"]["median"] > 0
            assert rows["cfe-async"]["extra / state"] > 1
    goals = {goal["goal"]: goal for goal in result["goals"]}
    assert goals["load / cold read"]["of"] == 1
    assert goals["durable / best DCP async, cfe-overlap"]["measured"].keys() == {result["cases"][0]["name"]}
    assert all(name in text for name in goals)


def test_memory_that_a_child_shares_with_its_parent_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "benchmarks"))
    files = importlib.import_module("bench_checkpoint.files")
    fd = os.memfd_create("shared")
    os.truncate(fd, 64 << 20)
    program = (
        "import mmap, sys\n"
        f"shared = mmap.mmap({fd}, 64 << 20)\n"
        "own = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "for memory in (shared, own):\n"
        "    for at in range(0, len(memory), 4096):\n"
        "        memory[at] = 1\n"
        "print('touched', flush=True)\n"
        "sys.stdin.read()\n"
    )
    before_bytes = files.children_bytes()
    with (
        mmap.mmap(fd, 64 << 20),
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(fd,)
        ) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == b"touched\n"
        more_bytes = files.children_bytes() - before_bytes
        child.communicate()
    os.close(fd)
    assert 32 << 20 < more_bytes < 64 << 20
