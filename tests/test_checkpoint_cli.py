"""`checkpoints ls|verify|prune|export` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_groups import all_good, run_ranks
from run_specs import run_spec

from cfe_hpc.checkpoints.store import save
from cfe_hpc.checkpoints.tracked import capture
from cfe_hpc.cli.main import main
from cfe_hpc.runfolder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 1 to 4 by two ranks; the loss is least at 2."""
    run = RunFolder(tmp_path / "runs" / "demo" / "demo-20260131-120000-00aa")
    run.checkpoints.mkdir(parents=True)
    spec = run_spec(run_id=run.run_id, name="demo", checkpoint={"keep_last": 1, "keep_best": "loss:min"})
    spec.write(run.run_toml)
    torch.manual_seed(0)
    models = [torch.nn.Linear(40, 30).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for step in range(1, 5):
        all_good(
            run_ranks(
                2,
                lambda group, step=step: save(
                    run.checkpoints,
                    capture({"model": models[group.rank]}, group=group),
                    step=step,
                    attempt=0,
                    run_id=run.run_id,
                    group=group,
                    metrics={"loss": abs(step - 2.0), "bad": float("nan")},
                ),
            )
        )
    return run


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["checkpoints", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys: pytest.CaptureFixture[str], *words: object) -> object:
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0
    return json.loads(out)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def names(folder: RunFolder) -> list[str]:
    """Of the checkpoints that are there."""
    return sorted(path.name for path in folder.checkpoints.iterdir() if path.is_dir())


def test_ls_shows_the_newest_first_and_what_is_unusable(folder: RunFolder, capsys) -> None:
    (folder.checkpoints / "step-000000003" / "shard-00001.bin").unlink()
    code, out, _ = call(capsys, "ls", folder.path)
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == [f"step-{step:09d}" for step in (4, 3, 2, 1)]
    assert "attempt 0  2 ranks" in lines[0] and lines[0].endswith("loss=2  bad=nan")
    assert lines[1] == "step-000000003  unusable: shard-00001.bin is missing"
    rows = document(capsys, "ls", folder.path)
    assert [row["usable"] for row in rows] == [True, False, True, True]
    assert rows[0]["metrics"] == {"loss": 2.0, "bad": "nan"} and rows[0]["world_size"] == 2


def test_ls_tensors_names_shared_ones_and_each_ranks_own(folder: RunFolder, capsys) -> None:
    code, out, _ = call(capsys, "ls", folder.path, "--tensors")
    assert code == 0 and "model/weight  bfloat16 [30, 40]\n" in out and "model/bias  bfloat16 [30]\n" in out
    rows = document(capsys, "ls", folder.path, "--tensors", "--step", 2)
    assert {"name": "model/weight", "dtype": "bfloat16", "shape": [30, 40], "rank": None} in rows


def test_verify_reads_every_byte(folder: RunFolder, capsys) -> None:
    assert call(capsys, "verify", folder.path)[0] == 0
    flip(folder.checkpoints / "step-000000003" / "shard-00000.bin", 5000)
    code, out, _ = call(capsys, "verify", folder.path)
    assert code == 1
    assert out.splitlines()[1].startswith("step-000000003  unusable: shard-00000.bin is altered: bytes 0 to ")
    assert [line.split()[1] for line in out.splitlines()] == ["verified", "unusable:", "verified", "verified"]
    assert call(capsys, "verify", folder.path, "--step", 4)[0] == 0


def test_prune_keeps_what_the_job_keeps_and_the_newest_that_verifies(folder: RunFolder, capsys) -> None:
    flip(folder.checkpoints / "step-000000004" / "shard-00000.bin", 5000)
    folder.append_event("resumed", attempt=1, step=1)
    kept = {"1": ["resumed"], "2": ["best"], "3": ["newest verified"], "4": ["last"]}
    assert document(capsys, "prune", folder.path, "--dry-run") == {"deleted": [], "superfluous": [], "kept": kept}
    folder.append_event("resumed", attempt=2, step=3)
    code, out, _ = call(capsys, "prune", folder.path)
    stays = "step 2 stays: best\nstep 3 stays: resumed\nstep 4 stays: last\n"
    assert (code, out) == (0, f"{stays}deleted step 1\n")
    assert names(folder) == [f"step-{step:09d}" for step in (2, 3, 4)]
    found = document(capsys, "prune", folder.path, "--keep-best", "loss:max")
    assert (found["deleted"], found["superfluous"]) == ([2], [2])


def test_export_is_a_safetensors_file(folder: RunFolder, tmp_path: Path, capsys) -> None:
    file = tmp_path / "model.safetensors"
    code, out, _ = call(capsys, "export", folder.path, file, "--only", "model/*")
    assert code == 0 and "step 4  2 tensors" in out
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    assert size % 8 == 0 and head.pop("__metadata__")["step"] == "4"
    assert head["model/weight"]["dtype"] == "BF16" and head["model/weight"]["shape"] == [30, 40]
    torch.manual_seed(0)
    expected = torch.nn.Linear(40, 30).bfloat16().weight.detach().view(torch.uint8).numpy().tobytes()
    low, high = head["model/weight"]["data_offsets"]
    assert content[8 + size :][low:high] == expected
    assert max(entry["data_offsets"][1] for entry in head.values()) == len(content) - 8 - size


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["verify", "{run}", "--step", "9"], 2, "no checkpoint of step 9; there are 4, 3, 2, 1"),
        (["export", "{run}", "{tmp}/none/x"], 2, "cannot be written: No such file or directory"),
        (["export", "{run}", "{tmp}/x", "--only", "nothing"], 2, "no tensor of step-000000004 matches"),
        (["ls", "{tmp}/none"], 2, "no such run"),
    ],
)
def test_mistakes_are_one_line(folder: RunFolder, tmp_path: Path, capsys, words, code: int, message: str) -> None:
    got, out, err = call(capsys, *(word.format(run=folder.path, tmp=tmp_path) for word in words))
    assert (got, out) == (code, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_damaged_export_leaves_the_file_as_it_was(folder: RunFolder, tmp_path: Path, capsys) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("before")
    flip(folder.checkpoints / "step-000000004" / "shard-00001.bin", 4096)
    code, _, err = call(capsys, "export", folder.path, file, "--step", 4)
    assert code == 1 and "shard-00001.bin is altered" in err
    assert file.read_text() == "before" and not list(tmp_path.glob(".model*"))


def test_the_login_side_loads_neither_torch_nor_numpy(folder: RunFolder, tmp_path: Path) -> None:
    script = (
        "import sys; from cfe_hpc.cli.main import main\n"
        "for action in ('ls', 'verify', 'prune'): assert main(['checkpoints', action, sys.argv[1]]) == 0\n"
        "assert main(['checkpoints', 'export', sys.argv[1], sys.argv[2]]) == 0\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'h5py'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", script, str(folder.path), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_crc32c_the_error_says_what_to_install(folder: RunFolder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "awscrt.checksums", None)
    code, _, err = call(capsys, "verify", folder.path)
    assert code == 1 and "pip install awscrt" in err and err.count("\n") == 1
