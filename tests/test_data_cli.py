"""`data build` and `data check` as commands: output, exit codes, what they load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cfe_hpc.cli import progress
from cfe_hpc.cli.main import main


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "some 'text';\n$(x).txt"
    path.write_text("To be, or not to be\n" * 10_000)
    return path


def test_build_then_check(text, tmp_path, capsys):
    out = str(tmp_path / "out.h5")
    assert main(["data", "build", out, str(text), "--json", "--max-document", "4096"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert (built["path"], built["dtype"], built["num_sources"]) == (out, "uint8", 1)
    assert main(["data", "check", out, "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["ok"] is True
    assert checked["splits"]["train"]["tokens"] == built["splits"]["train"]["tokens"]
    assert main(["data", "check", out]) == 0
    assert f"{out}: good" in capsys.readouterr().out


def test_stdlib(tmp_path, capsys):
    out = str(tmp_path / "stdlib.h5")
    assert main(["data", "build", "--stdlib", out, "--max-bytes", "1MiB"]) == 0
    assert "vocabulary 256" in capsys.readouterr().out


def test_each_stage_has_a_bar_where_somebody_looks(text, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "out.h5")
    monkeypatch.setattr(progress, "_AFTER_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for words, stages in ((["build", out, str(text)], ("reading", "writing")), (["check", out], ("checking train",))):
        assert main(["data", *words]) == 0
        shown = capsys.readouterr().err
        assert all(stage in shown for stage in stages), shown
        assert main(["data", *words, "--json", *(["--force"] if "build" in words else [])]) == 0
        assert capsys.readouterr().err == ""


def test_a_damaged_file_ends_with_1_and_its_place(text, tmp_path, capsys):
    out = tmp_path / "out.h5"
    main(["data", "build", str(out), str(text), "--max-document", "4096"])
    raw = bytearray(out.read_bytes())
    raw[-1000] ^= 4
    out.write_bytes(raw)
    capsys.readouterr()
    assert main(["data", "check", str(out), "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ok"] is False
    assert shown.err.startswith(f"error: {out}: ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "out.h5"], "error: data build: no SOURCE"),
        (["build", "out.h5", "x.txt", "--stdlib"], "error: data build: --stdlib and SOURCE exclude each other"),
        (["build", "out.h5", "x.txt"], "error: x.txt: no such file or folder; check the path"),
        (["build", "no/out.h5", "x.txt"], r"error: no/out.h5: no such folder (no); make it first"),
        (["build", ".", "x.txt"], "error: .: is a folder"),
        (["build", "out.h5", "--stdlib", "--max-bytes", "lots"], "error: --max-bytes: not a size"),
        (["build", "out.h5", "--stdlib", "--max-bytes", "1"], "error: --max-bytes: less than the first file (1)"),
        (["build", "out.h5", "--stdlib", "--include", "*.c"], "error: data build: --include is for folders"),
        (["build", "out.h5", "x.txt", "--separator", "dot"], "error: --separator: not a token (dot)"),
        (["check", "none.h5"], "error: none.h5: no such file"),
    ],
)
def test_wrong_command_lines_end_with_2_and_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_numpy():
    program = (
        "import sys\n"
        "from cfe_hpc.cli.main import main\n"
        "try:\n    main(['data', 'build', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'numpy', 'h5py', 'torch'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--stdlib" in done.stdout
