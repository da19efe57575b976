"""DDP on two processes: what goes on after a restore is the undisturbed training, bit for bit."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest


def train(mode: str, folder: Path) -> list[list[str]]:
    """What each of two ranks printed: first step, digest of weights and moments, last loss, learning rate."""
    with_others = socket.socketpair()
    ranks = []
    try:
        for rank, link in enumerate(with_others):
            words = [sys.executable, str(Path(__file__).with_name("checkpoint_ddp_worker.py")), mode, str(folder)]
            words += [str(rank), "2", str(link.fileno())]
            ranks.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, pass_fds=[link.fileno()]))
        return [rank.communicate(timeout=120)[0].split() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
        for link in with_others:
            link.close()


@pytest.mark.slow
def test_two_ranks_go_on_as_if_undisturbed(tmp_path: Path) -> None:
    whole, resumed = train("whole", tmp_path), train("resume", tmp_path)
    assert [words[0] for words in whole + resumed] == ["0", "0", "4", "4"]
    assert [words[1:] for words in whole] == [words[1:] for words in resumed]
    assert whole[0][2] != whole[1][2], "each rank has its own data"
