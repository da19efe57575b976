"""`checkpoints pin`, `export` for other programs, `diff`, and what `ls` remembers of `verify`."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_runs import call, document, flip, new_run, put
from safetensors.torch import load_file

from cfe_hpc.checkpoints import marks
from cfe_hpc.checkpoints.keeping import pins
from cfe_hpc.checkpoints.layout import CHUNK_BYTES
from cfe_hpc.checkpoints.tools.arithmetic import Arithmetic
from cfe_hpc.cli import progress
from cfe_hpc.errors import CheckpointError
from cfe_hpc.runfolder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has saved a small module at steps 1 to 3, each with other weights."""
    run = new_run(tmp_path / "runs", keep_last=1)
    for step in range(1, 4):
        torch.manual_seed(step)
        put(run, {"model": torch.nn.Linear(40, 30), "counter": torch.nn.ParameterDict()}, step=step)
    return run


def weights_of(step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(step)
    return torch.nn.Linear(40, 30).state_dict()


def test_pinned_ones_stay_show_their_note_and_stay_when_saved_again(folder: RunFolder, capsys) -> None:
    code, out, _ = call(capsys, "pin", folder.path, "--step", 1, "--note", "for the paper")
    assert (code, out) == (0, "step-000000001  pinned\n")
    assert document(capsys, "prune", folder.path)["kept"] == {"1": ["pinned"], "3": ["last", "newest verified"]}
    put(folder, {"model": torch.nn.Linear(40, 30)}, step=1, attempt=1)
    put(folder, {"model": torch.nn.Linear(40, 30)}, step=4, attempt=1)
    rows = {row["step"]: row for row in document(capsys, "ls", folder.path)}
    assert rows[1]["kept_by"] == ["pinned"] and rows[1]["note"] == "for the paper"
    assert "kept by pinned (for the paper)" in call(capsys, "ls", folder.path)[1]
    assert call(capsys, "pin", folder.path, "--step", 1, "--unpin")[1] == "step-000000001  unpinned\n"
    assert call(capsys, "pin", folder.path, "--step", 1, "--unpin")[1] == "step-000000001  was not pinned\n"
    assert document(capsys, "prune", folder.path)["deleted"] == [1, 3]


def test_a_checkpoint_that_goes_while_it_is_pinned_is_told(folder: RunFolder, monkeypatch) -> None:
    path = folder.checkpoints / "step-000000001"
    monkeypatch.setattr(pins, "_PATIENCE_S", 0.1)
    os.rename(path, folder.checkpoints / "elsewhere")
    with pytest.raises(CheckpointError, match="step-000000001: not pinned: it has just been rotated away"):
        pins.pin(path, folder.run_id)
    assert not marks.holds(path)


def test_ls_trusts_a_verification_only_while_the_files_are_the_same(folder: RunFolder, capsys) -> None:
    assert [row["verified"] for row in document(capsys, "ls", folder.path)] == [None] * 3
    assert "not verified" in call(capsys, "ls", folder.path)[1]
    flip(folder.checkpoints / "step-000000002" / "shard-00000.bin", 5000)
    assert call(capsys, "verify", folder.path)[0] == 1
    found = {row["step"]: row["verified"] for row in document(capsys, "ls", folder.path)}
    assert [found[step]["good"] for step in (1, 2, 3)] == [True, False, True]
    assert "is altered" in found[2]["reason"] and "DAMAGED: shard-00000.bin" in call(capsys, "ls", folder.path)[1]
    time.sleep(0.02)
    flip(folder.checkpoints / "step-000000003" / "shard-00000.bin", 5000)
    found = {row["step"]: row["verified"] for row in document(capsys, "ls", folder.path)}
    assert found[3] is None and found[1]["good"]


def test_weights_are_exported_by_their_plain_names(folder: RunFolder, tmp_path: Path, capsys) -> None:
    file = tmp_path / "model.safetensors"
    code, out, err = call(capsys, "export", folder.path, file, "--step", 2, "--weights", "--object", "model")
    assert code == 0 and "step 2  2 tensors" in out and err == ""
    loaded, expected = load_file(file), weights_of(2)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_an_engines_masters_are_the_weights(tmp_path: Path, capsys) -> None:
    class Engine:
        """Lays its state out as DeepSpeed's adapter does."""

        def checkpoint_layout(self):
            return {"engine": "deepspeed", "zero_stage": 2, "precision": "bf16"}

        def checkpoint_state(self):
            from cfe_hpc.checkpoints.protocols import Piece

            def piece(name: str, value: float) -> Piece:
                data = memoryview(struct.pack("<6f", *[value] * 6))
                return Piece(name=name, dtype="float32", shape=(2, 3), start=0, data=data)

            return [piece("master/a.w", 1.0), piece("exp_avg/a.w", 2.0), piece("buffer/a.b@0", 3.0)], {}

        def load_checkpoint_state(self, reader, tree):
            raise AssertionError("nothing is loaded here")

    run = new_run(tmp_path / "runs")
    put(run, {"engine": Engine()}, step=7, ranks=1)
    assert "deepspeed ZeRO 2" in call(capsys, "ls", run.path)[1]
    assert document(capsys, "ls", run.path)[0]["layout"]["zero_stage"] == 2
    out = tmp_path / "hf"
    assert call(capsys, "export", run.path, out, "--format", "hf", "--dtype", "bf16")[0] == 0
    loaded = load_file(out / "model.safetensors")
    assert {name: (tensor.dtype, tensor[0, 0].item()) for name, tensor in loaded.items()} == {
        "a.w": (torch.bfloat16, 1.0),
        "a.b": (torch.bfloat16, 3.0),
    }


def test_hugging_faces_layout_has_shards_of_the_size_asked_for(tmp_path: Path, capsys) -> None:
    run, out = new_run(tmp_path / "runs"), tmp_path / "hf"
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(5)))
    put(run, {"model": model}, step=1)
    code, _, err = call(capsys, "export", run.path, out, "--format", "hf", "--max-shard-size", "40kB")
    assert code == 0, err
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert (
        shards == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)] == sorted({*index["weight_map"].values()})
    )
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    loaded: dict[str, torch.Tensor] = {}
    for name in shards:
        assert (out / name).stat().st_size <= 42_000
        part = load_file(out / name)
        assert all(index["weight_map"][key] == name for key in part)
        loaded |= part
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob(".hf*"))


EDGES = [0.0, -0.0, math.inf, -math.inf, 1.0, 1e-40, -1e-45, 3.4028235e38, 65504.0, 6e-8]


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_rounded_as_torch_rounds_them(source: torch.dtype, target: torch.dtype) -> None:
    torch.manual_seed(0)
    if source == torch.float32:
        words = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), dtype=torch.int64).to(torch.int32)
        ties = torch.arange(0, 1 << 16, dtype=torch.int64) * 65536 + 0x8000 - (1 << 31)
        values = torch.cat([words.view(source), ties.to(torch.int32).view(source), torch.tensor(EDGES)])
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(source)  # all there are
    with Arithmetic() as arithmetic:
        raw = values.view(torch.uint8).numpy().tobytes()
        arithmetic.first[: len(raw)] = raw
        answer = arithmetic.convert(*(str(dtype).removeprefix("torch.") for dtype in (source, target)), len(values))
        got = torch.frombuffer(bytearray(answer), dtype=target)
    expected = values.to(target)
    nans = values.isnan()
    assert torch.equal(got.isnan(), nans)
    bits = torch.int16 if target == torch.bfloat16 else torch.int32
    assert torch.equal(got[~nans].view(bits), expected[~nans].view(bits))


def test_conversion_says_what_to_install(folder: RunFolder, tmp_path: Path, monkeypatch, capsys) -> None:
    broken = tmp_path / "path" / "numpy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    code, _, err = call(capsys, "export", folder.path, tmp_path / "x", "--dtype", "bf16")
    assert (code, err.count("\n")) == (1, 1) and "pip install numpy" in err
    assert not list(tmp_path.glob("*x*"))


def test_diff_names_what_differs_and_by_how_much(tmp_path: Path, capsys) -> None:
    run = new_run(tmp_path / "runs")
    tensors = {"same": torch.arange(9.0), "moved": torch.arange(8.0), "shape": torch.zeros(3), "first": torch.ones(2)}
    put(run, {"state": Plain(tensors)}, step=1)
    changed = dict(tensors, moved=tensors["moved"].clone(), shape=torch.zeros(4), second=torch.ones(2))
    changed["moved"][4] = 5.0
    changed["moved"][6] = math.nan
    del changed["first"]
    put(run, {"state": Plain(changed)}, step=2, ranks=3)
    found = document(capsys, "diff", run.path, "--step", 1, 2, code=1)
    assert found["only_first"] == ["state/first"] and "state/second" in found["only_second"]
    assert found["reshaped"] == [{"name": "state/shape", "first": "float32 [3]", "second": "float32 [4]"}]
    moved = next(each for each in found["changed"] if each["name"] == "state/moved")
    assert (moved["differing"], moved["max_abs"], moved["max_rel"], moved["not_finite"]) == (2, 1.0, 0.2, 1)
    assert "state/same" not in [each["name"] for each in found["changed"]] and found["equal"] >= 1
    code, out, _ = call(capsys, "diff", run.path, "--step", 1, 2)
    assert code == 1 and "state/moved  2 of 8 differ, by 1 at most, relatively 0.2, 1 with no finite distance\n" in out


class Plain:
    """An object with tensors, and nothing else."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state


def test_diff_reads_only_what_checksums_leave_open(tmp_path: Path, capsys) -> None:
    runs = [new_run(tmp_path / name) for name in ("one", "two")]
    large = {"large": torch.arange(3 * CHUNK_BYTES, dtype=torch.uint8)}
    put(runs[0], {"state": Plain(large)}, step=1, ranks=1)
    large["large"] = large["large"].clone()
    large["large"][2 * CHUNK_BYTES] += 1
    put(runs[1], {"state": Plain(large)}, step=5, ranks=1)
    found = document(capsys, "diff", runs[0].path, runs[1].path, code=1)
    (changed,) = [each for each in found["changed"] if each["name"] == "state/large"]
    assert changed["differing"] == 1
    # The first chunk has the header, the third the change; the rest of the last is small.
    assert 2 * CHUNK_BYTES - 10_000 < found["read_bytes"] < 2 * CHUNK_BYTES + 100_000
    same = document(capsys, "diff", runs[0].path, "--step", 1, 1)
    assert same["same"] and same["read_bytes"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64], ids=str)
def test_distances_are_those_of_the_numbers(dtype: torch.dtype) -> None:
    one = torch.tensor([1, 0, 1, 0]).to(dtype)
    two = torch.tensor([1, 1, 0, 0]).to(dtype)
    with Arithmetic() as arithmetic:
        for place, values in ((arithmetic.first, one), (arithmetic.second, two)):
            raw = values.view(torch.uint8).numpy().tobytes()
            place[: len(raw)] = raw
        found = arithmetic.compare(str(dtype).removeprefix("torch."), 4)
    assert (found.differing, found.max_abs, found.max_rel, found.not_finite) == (2, 1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["export", "{run}"], 2, "which FILE?"),
        (["export", "{run}", "{tmp}"], 2, "is a folder; name a file"),
        (["export", "{run}", "{tmp}", "--format", "hf"], 2, "is there already"),
        (["export", "{run}", "{tmp}/x", "--epochs"], 2, "--epochs: leave out FILE"),
        (["export", "{run}", "--epochs"], 2, "no checkpoint is marked as an epoch's end"),
        (["export", "{run}", "{tmp}/x", "--weights"], 1, "2 objects hold weights (counter, model); name one"),
        (["export", "{run}", "{tmp}/x", "--object", "ema"], 1, "ema is no tracked object with weights"),
        (["export", "{run}", "{tmp}/x", "--max-shard-size", "huge"], 2, "--max-shard-size: huge"),
        (["export", "{run}", "{tmp}/x", "--dtype", "int4"], 2, "no such choice"),
        (["diff", "{run}"], 2, "which two checkpoints? give --step A B, or a second run"),
        (["diff", "{run}", "--step", "1", "9"], 2, "no checkpoint of step 9"),
        (["diff", "{run}", "--step", "1", "2", "3"], 2, "3 steps were given"),
        (["pin", "{run}", "--step", "9"], 2, "no checkpoint of step 9; there are 3, 2, 1"),
        (["pin", "{run}"], 2, "--step"),
        (["pin", "{run}", "--step", "1", "--unpin", "--note", "x"], 2, "leave it out with --unpin"),
    ],
)
def test_mistakes_are_one_line(folder: RunFolder, tmp_path: Path, capsys, words, code: int, message: str) -> None:
    got, out, err = call(capsys, *(word.format(run=folder.path, tmp=tmp_path) for word in words))
    assert (got, out) == (code, ""), err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_bar_is_shown_where_somebody_looks(monkeypatch, capsys) -> None:
    with progress.bar("reading", 100, quiet=False) as advance:
        advance(50)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.bar("reading", 100, quiet=True) as advance:
        advance(50)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_AFTER_S", 3600.0)
    with progress.bar("reading", 100, quiet=False) as advance:
        advance(100)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_AFTER_S", 0.0)
    with progress.bar("reading", 100, quiet=False) as advance:
        advance(100)
    assert "reading" in capsys.readouterr().err
