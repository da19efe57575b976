"""A command in a terminal of its own, talked to line by line, as a person does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pexpect

TIMEOUT_S = 60.0


@contextlib.contextmanager
def dialogue(*words: str, cwd: Path, env: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> Iterator[Any]:
    """`python -m cfe_hpc WORDS` in a terminal of 80 columns, killed at the end of the body at the latest."""
    argv = ["-m", "cfe_hpc", *words]
    child = pexpect.spawn(
        sys.executable, argv, cwd=str(cwd), env=dict(env), encoding="utf-8", timeout=timeout_s, dimensions=(24, 80)
    )
    child.delaybeforesend = None
    try:
        yield child
    finally:
        child.close(force=True)


def ended(child: Any) -> int:
    """Wait for the command's end; its status."""
    child.expect(pexpect.EOF)
    child.close()
    return int(child.exitstatus if child.exitstatus is not None else -child.signalstatus)
