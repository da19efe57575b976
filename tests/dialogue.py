"""A program in a terminal of its own, talked to line by line, as a person does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pexpect
from pexpect.fdpexpect import fdspawn

TIMEOUT_S = 60.0

# The program's own PATH may be short of everything.
_SETSID = shutil.which("setsid") or "setsid"
_ENV = shutil.which("env") or "env"


class Dialogue(fdspawn):
    """pexpect's `expect` and `sendline`, for a program that holds the other end of a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        super().__init__(descriptor, timeout=TIMEOUT_S, encoding="utf-8", codec_errors="replace")
        self.process = process

    def __str__(self) -> str:
        """What stands in a failed test: the last words of the program."""
        return f"{super().__str__()}; it said last: {(self.before or '')[-2000:]!r}"

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.send("\x03")

    def ended(self) -> int:
        """Wait for the program's end; its status."""
        self.expect(pexpect.EOF)
        return self.process.wait(timeout=TIMEOUT_S)


@contextlib.contextmanager
def talking(argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], columns: int = 80) -> Iterator[Any]:
    """A program in a terminal, killed at the end of the body at the latest."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # Not by forking here: pytest's process has threads. Ctrl-C is ignored where the suite runs in the background.
    hearing = [_SETSID, "--ctty", _ENV, "--default-signal=INT", *argv]
    process = subprocess.Popen(hearing, cwd=cwd, env=dict(env), stdin=its, stdout=its, stderr=its)
    os.close(its)
    child = Dialogue(process, ours)
    try:
        yield child
    finally:
        child.close()
        process.kill()
        process.wait(timeout=TIMEOUT_S)


def dialogue(*words: str, cwd: Path, env: Mapping[str, str]) -> contextlib.AbstractContextManager[Any]:
    """`python -m cfe_hpc WORDS` in a terminal."""
    return talking([sys.executable, "-m", "cfe_hpc", *words], cwd=cwd, env=env)
