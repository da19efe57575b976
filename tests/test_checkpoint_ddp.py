"""DDP on two processes: what goes on after a restore is the undisturbed training, bit for bit."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def train(mode: str, folder: Path) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """What each of two ranks printed: first step, digest of weights and moments, last loss, learning rate; and what
    it captured."""
    with_others = socket.socketpair()
    ranks = []
    try:
        for rank, link in enumerate(with_others):
            words = [sys.executable, str(Path(__file__).with_name("checkpoint_ddp_worker.py")), mode, str(folder)]
            words += [str(rank), "2", str(link.fileno())]
            ranks.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, pass_fds=[link.fileno()]))
        lines = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
        return [first.split() for first, _ in lines], [json.loads(second) for _, second in lines]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
        for link in with_others:
            link.close()


@pytest.mark.slow
def test_two_ranks_go_on_as_if_undisturbed(tmp_path: Path) -> None:
    (whole, captured), (resumed, _) = train("whole", tmp_path), train("resume", tmp_path)
    assert [words[0] for words in whole + resumed] == ["0", "0", "4", "4"]
    assert [words[1:] for words in whole] == [words[1:] for words in resumed]
    assert whole[0][2] != whole[1][2], "each rank has its own data"
    for each in captured:
        look_at(each)
    assert abs(captured[0]["written_bytes"] - captured[1]["written_bytes"]) < 20_000


def look_at(captured: dict[str, Any]) -> None:
    """What DDP keeps alike was divided without checksums; buffers and what DDP ignores differ, and were found to."""
    weights = {f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")}
    own = {name for name in captured["own"] if not name.startswith(("~rng", "data/"))}
    assert own == {"model/mine", "model/1.running_mean", "model/1.running_var"}
    shared = {"model/1.num_batches_tracked", *(f"model/{name}" for name in weights)}
    state = {f"optimizer/state/{index}/{key}" for index in range(6) for key in ("exp_avg", "exp_avg_sq", "step")}
    assert set(captured["shared"]) <= shared | state
    moving = {name for name in captured["shared"] if not name.endswith(("/step", "/1.num_batches_tracked"))}
    assert set(captured["steady"]) == moving
    buffers_bytes = 2 * 4096 * 4
    ends_bytes = 3 * 6 * 2 * 4096
    assert captured["summed_bytes"] < buffers_bytes + ends_bytes + 10_000 < captured["written_bytes"]
    assert captured["apart"] == ["optimizer/state/0/exp_avg"]
    assert captured["unchanged"] == [True, True, False], "a forward and backward change nothing, a step does"
