"""Asking Slurm again while its controller gives no answer: it may be starting anew, or have much to do."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from cfe_hpc.process import CommandError

__all__ = ["PATIENCE_S", "insist"]

logger = logging.getLogger(__name__)

PATIENCE_S = 180.0
_RETRY_S = 2.0
_NO_ANSWER = re.compile(r"no answer|contact slurm|timed out|connect", re.IGNORECASE)

T = TypeVar("T")


def insist(ask: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
    """What `ask` returns, once the controller answers. An answer that is a refusal is an answer.

    Args:
        patience_s: how long it is asked anew.

    Raises:
        CommandError: it refuses, scontrol cannot be run, or it has given no answer in all that time.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except CommandError as error:
            if not _NO_ANSWER.search(str(error)) or time.monotonic() > deadline_s:
                raise
            logger.warning("%s; asking again", error)
            time.sleep(_RETRY_S)
