"""FSDP2, DDP and plain models on one to three ranks: each takes what any other saved, bit for bit, and trains on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fsdp_worker import LAYOUTS, RANKS

from cfe_hpc.checkpoints.reader import Opened

pytestmark = pytest.mark.slow
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What each rank printed."""
    words = [sys.executable, str(Path(__file__).with_name("checkpoint_fsdp_worker.py")), str(folder)]
    ranks = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(RANKS)]
    try:
        return [json.loads(rank.communicate(timeout=150)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize(("kind", "size"), LAYOUTS)
@pytest.mark.parametrize("saved", [f"{kind}{size}" for kind, size in LAYOUTS])
def test_any_layout_takes_what_any_other_saved(found: Found, saved: str, kind: str, size: int) -> None:
    undisturbed = found[0][saved]
    for rank in range(size):
        resumed = found[rank][f"{saved} {kind}{size}"]
        assert resumed["digest"] == undisturbed["digest"], "weights, moments and counters"
        if saved == f"{kind}{size}":
            assert resumed["next"] == undisturbed["next"]
        elif "mixed" not in (saved[:5], kind):
            assert resumed["next"] == pytest.approx(undisturbed["next"], rel=1e-6)
    assert found[0][f"{saved} {kind}{size}"]["sha"] == undisturbed["sha"]


@pytest.mark.parametrize("layout", ["fsdp3", "hsdp3"])
def test_each_element_is_written_once(found: Found, folder: Path, layout: str) -> None:
    opened = Opened.at(folder / layout / "step-000000002")
    indexes = [json.loads((opened.folder / f"shard-0000{rank}.json").read_text()) for rank in range(RANKS)]
    assert all(index["shared"] for index in indexes), "replicas divide the work"
    written = sum(extent["count"] for index in indexes for extent in index["shared"])
    assert written == sum(math.prod(opened.reader.describe(name)[1]) for name in opened.reader.names())


def test_columns_are_refused_on_every_rank(found: Found) -> None:
    assert {each["columns"] for each in found} == {
        "model/weight: a DTensor placed (Shard(dim=1),) cannot be stored; only Shard(0) and Replicate can"
    }


def test_an_evaluation_before_a_save_changes_nothing(found: Found) -> None:
    before, after = found[0]["evaluated"]
    assert before == after
    for each in found:
        assert each["evaluated dtypes"] == ["float32"]
        assert each["evaluated names"][:3] == ["model/embed.weight", "model/up.weight", "model/down.weight"]


def test_shards_are_steady_until_the_optimizer_steps(found: Found) -> None:
    assert all(each["unchanged"] == [True, False] for each in found)
    assert all("model/up.weight" in each["steady"] for each in found)
    assert not any("step" in name or "seen" in name for each in found for name in each["steady"])
