"""A program in a real terminal of a given size: what its screen shows, and keys pressed in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyte

if TYPE_CHECKING:
    from typing_extensions import Self


class Terminal:
    """Close it, or use it with `with`: the program is killed then."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        lines: int = 24,
        columns: int = 80,
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        _set_size(slave, lines, columns)
        environment = dict(os.environ if env is None else env)
        for name in ("LINES", "COLUMNS", "NO_COLOR"):
            environment.pop(name, None)
        environment |= {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the program if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        os.close(self._master)

    @property
    def text(self) -> str:
        """The screen as it is now, without blanks at the ends of lines."""
        self._read(0.0)
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait_for(self, *words: str, gone: Sequence[str] = (), timeout_s: float = 30.0) -> str:
        """Read until the screen shows all the words, and none of those that are to be gone; the screen."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self.text
            if all(word in shown for word in words) and not any(word in shown for word in gone):
                return shown
            if time.monotonic() > deadline:
                raise AssertionError(f"no {words} (without {tuple(gone)}) within {timeout_s:g} s in\n{shown}")
            self._read(0.1)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def resize(self, lines: int, columns: int) -> None:
        """Give the terminal another size, as its user would."""
        self.screen.resize(lines, columns)
        _set_size(self._master, lines, columns)  # the kernel sends SIGWINCH

    def wait_end(self, timeout_s: float = 30.0) -> int:
        """Read until the program has ended; its exit status."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"it still runs:\n{self.text}")
            self._read(0.1)
        return self.process.returncode

    def _read(self, wait_s: float) -> None:
        """Take what the program has written, waiting a little for it."""
        while select.select([self._master], [], [], wait_s)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: nobody holds the other end any more
                return
            if not data:
                return
            self._stream.feed(data)
            wait_s = 0.0


def _set_size(descriptor: int, lines: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def _take_terminal() -> None:
    """Make standard input the terminal that this session hears signals from, of its size among them."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
