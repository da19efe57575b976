"""DeepSpeed's own checkpoints: loaded at any world size, written for DeepSpeed, refused when not safe or not whole."""

from __future__ import annotations

import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from resharding import BF16, SAVED_AT, SIZES, ZERO, Training
from train_ranks import on_ranks

FULL = os.environ.get("CFE_TEST_FULL") == "1"
MORE = 50 if FULL else 8
ENGINES = (*ZERO, *BF16)
SAVED_BY = SIZES if FULL else (3,)
LOADED_BY = SIZES if FULL else (2, 3)
TIMEOUT_S = 1800.0 if FULL else 240.0
CROSSED = (("zero1", "zero3"), ("zero3", "zero2"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S)]


def saved(rank: int, root: str, more: int) -> dict[str, dict[str, Any]]:
    """Train with DeepSpeed alone, save, and go on undisturbed."""
    results = {}
    for engine in ENGINES:
        training = Training(engine, seed=1)
        training.train(0, SAVED_AT)
        training.deepspeed.save_checkpoint(f"{root}/{engine}-{training.world}", client_state={"epoch": 3})
        whole = training.whole()
        results[engine] = {"whole": whole, "losses": training.train(SAVED_AT, SAVED_AT + more)}
    return results


def loaded(rank: int, root: str, sizes: tuple[int, ...], more: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Import each of them, export it again, load the export with DeepSpeed alone, and go on with both."""
    from cfe_hpc.checkpoints.state.deepspeed_files import load_deepspeed_checkpoint, save_deepspeed_checkpoint

    results = {}
    for engine, saved_by in product(ENGINES, sizes):
        training = Training(engine, seed=2)
        imported = load_deepspeed_checkpoint(training.deepspeed, f"{root}/{engine}-{saved_by}")
        whole, out = training.whole(), f"{root}/out-{engine}-{saved_by}-{training.world}"
        save_deepspeed_checkpoint(training.deepspeed, out, "exported", client_state=imported.client_state)
        other = Training(engine, seed=3)
        _, client_state = other.deepspeed.load_checkpoint(out)
        results[engine, saved_by] = {
            "facts": (imported.step, imported.world_size, imported.client_state),
            "whole": whole,
            "losses": training.train(SAVED_AT, SAVED_AT + more),
            "exported": (other.whole(), other.train(SAVED_AT, SAVED_AT + more), client_state["epoch"]),
        }
    return results


def crossed(rank: int, root: str, saved_by: int) -> dict[tuple[str, str], Any]:
    """Import into another stage than the one that saved."""
    from cfe_hpc.checkpoints.state.deepspeed_files import load_deepspeed_checkpoint

    results = {}
    for source, target in CROSSED:
        training = Training(target, seed=2)
        load_deepspeed_checkpoint(training.deepspeed, f"{root}/{source}-{saved_by}")
        results[source, target] = training.whole()
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def before(root: Path) -> dict[int, Any]:
    return {size: on_ranks(size, saved, str(root), MORE, timeout_s=TIMEOUT_S)[0] for size in SAVED_BY}


@pytest.fixture(scope="module")
def after(root: Path, before: Any) -> dict[int, Any]:
    return {size: on_ranks(size, loaded, str(root), SAVED_BY, MORE, timeout_s=TIMEOUT_S)[0] for size in LOADED_BY}


@pytest.mark.parametrize("engine", ENGINES)
def test_import_is_exact_at_any_size(engine: str, before: Any, after: Any) -> None:
    for saved_by, size in product(SAVED_BY, LOADED_BY):
        result, reference = after[size][engine, saved_by], before[saved_by][engine]
        assert result["facts"] == (SAVED_AT, saved_by, {"epoch": 3})
        assert result["whole"] == reference["whole"]
        if saved_by == size:
            assert result["losses"] == reference["losses"]
        elif "bf16" not in engine:
            assert result["losses"] == pytest.approx(reference["losses"], rel=0, abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_deepspeed_itself_loads_what_is_exported(engine: str, before: Any, after: Any) -> None:
    for saved_by, size in product(SAVED_BY, LOADED_BY):
        result = after[size][engine, saved_by]
        assert result["exported"] == (result["whole"], result["losses"], 3)


def test_import_is_exact_into_another_stage(root: Path, before: Any) -> None:
    (results,) = on_ranks(1, crossed, str(root), SAVED_BY[-1])
    for (source, target), whole in results.items():
        assert whole == before[SAVED_BY[-1]][source]["whole"], f"{source} into {target}"


class Unsafe:
    """What a client state may hold, and what no stranger's file should have unpickled."""


def refusals(rank: int, root: str) -> dict[str, str]:
    """Messages for spoiled checkpoints of two ranks."""
    import torch

    from cfe_hpc.checkpoints.state.deepspeed_reader import DeepSpeedReader
    from cfe_hpc.errors import CheckpointError

    training = Training("zero2", seed=1)
    folder = Path(root)
    for step in (1, 2):
        training.train(step - 1, step)
        training.deepspeed.save_checkpoint(root, f"step{step}", client_state={"kept": Unsafe()} if step == 1 else {})
    torch.distributed.barrier()
    if rank:
        return {}
    own, other = ("zero_pp_rank_1_mp_rank_00_optim_states.pt", folder / "step1")

    def spoiled(name: str, spoil: Any) -> str:
        shutil.copytree(folder / "step2", folder / name)
        spoil(folder / name)
        out = bytearray(4 * 13 * 13)
        with pytest.raises(CheckpointError) as caught:
            DeepSpeedReader(folder / name).read_into("master/1.0.weight", 0, memoryview(out))
        return f"{type(caught.value).__name__}: {caught.value}"

    messages = {
        "whole": repr(DeepSpeedReader(folder / "step1", [Unsafe]).client_state["kept"]),
        "missing": spoiled("missing", lambda path: (path / own.replace("_1_", "_0_")).unlink()),
        "other step": spoiled("other", lambda path: shutil.copy(other / own, path / own)),
        "torn": spoiled("torn", lambda path: os.truncate(path / own, 1500)),
        "none": spoiled("none", lambda path: [each.unlink() for each in path.glob("*optim*")]),
    }
    with pytest.raises(CheckpointError) as caught:
        DeepSpeedReader(folder / "step1")
    return {**messages, "unsafe": str(caught.value)}


def test_what_is_unsafe_or_not_whole_is_refused(tmp_path: Path) -> None:
    messages = on_ranks(2, refusals, str(tmp_path))[0]
    assert "Unsafe" in messages["whole"]
    assert messages["missing"].startswith("CorruptCheckpoint") and "rank 0 is missing" in messages["missing"]
    assert messages["other step"].startswith("CorruptCheckpoint") and "not of the same step" in messages["other step"]
    assert messages["torn"].startswith("CorruptCheckpoint: zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read")
    assert messages["none"].endswith("holds no DeepSpeed checkpoint of ZeRO 1, 2 or 3")
    assert "test_deepspeed_files.Unsafe" in messages["unsafe"] and "safe_globals" in messages["unsafe"]
