"""Ranks as processes of their own, for what is collective."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def heard(rank_main: Callable[..., None], size: int, *words: Any) -> dict[int, Any]:
    """What each rank put into its queue of answers, by rank; all of them have ended well.

    Args:
        rank_main: called with the rank, a free port, `words` and the queue, into which it puts (rank, answer).
    """
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    ranks = [context.Process(target=rank_main, args=(rank, port, *words, answers)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        found = dict(answers.get(timeout=120) for _ in ranks)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    answers.close()
    assert [process.exitcode for process in ranks] == [0] * size
    return found
