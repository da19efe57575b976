"""Logging of the `cfe_hpc` logger tree alone; the root logger belongs to the user's program."""

from __future__ import annotations

import logging
import sys
import time

__all__ = ["configure"]


def configure(*, rank: int | None = None, verbose: bool = False) -> None:
    """Send this package's log to standard error, once per process; calling it again changes the level only.

    Args:
        rank: global rank, named in every line; ranks other than 0 log warnings only. None on the login node.
        verbose: log at DEBUG whatever the rank.
    """
    logger = logging.getLogger("cfe_hpc")
    quiet = rank not in (None, 0)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    if logger.handlers:
        return
    who = "" if rank is None else f" [rank {rank}]"
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(f"%(asctime)s cfe_hpc{who} %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger.addHandler(handler)
