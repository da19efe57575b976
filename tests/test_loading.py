"""How often Python looks for garbage: seldom while a rank loads, as usual from its first step on."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from spine.harness import LiveRun, write_job

from cfe_hpc.ranks import loading


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    loading.ends()
    gc.set_threshold(*before)


def test_the_usual_comes_back() -> None:
    before = gc.get_threshold()
    loading.begins()
    loading.begins()
    assert gc.get_threshold()[0] > before[0]
    loading.ends()
    loading.ends()
    assert gc.get_threshold() == before


def test_what_somebody_has_set_meanwhile_stands() -> None:
    loading.begins()
    gc.set_threshold(123, 4, 5)
    loading.ends()
    assert gc.get_threshold() == (123, 4, 5)


ENTRY = """
import gc, json

def train(run):
    seen = {"loading": gc.get_threshold()}
    for step in run.steps(1):
        seen["training"] = gc.get_threshold()
    (run.folder.path / "seen.json").write_text(json.dumps(seen))
"""


def test_a_rank_looks_seldom_until_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "looking.py").write_text(ENTRY)
    job = write_job(tmp_path, name="looking", entry="looking:train")
    run = LiveRun.submit(job, "local", cwd=tmp_path, env=os.environ)
    assert run.wait_result()["state"] == "COMPLETED"
    seen = json.loads((run.folder.path / "seen.json").read_text())
    assert seen["loading"][0] > seen["training"][0] == gc.get_threshold()[0]
