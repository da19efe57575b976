"""Unlinking what has lost its name already, beside whatever this process does."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from pathlib import Path

from cfe_hpc.checkpoints import folders

__all__ = ["FILES_PER_S", "Remover"]

FILES_PER_S = 100.0
"""Files unlinked in a second: a checkpoint of a thousand ranks is two thousand, and the servers that keep a parallel
filesystem's names serve every job of the cluster."""

_log = logging.getLogger(__name__)


class Remover:
    """Deletes the trash of one folder in a thread, slowly. The thread is there while there is trash.

    A file is unlinked in one call however big it is: truncating it first in pieces of 256 MiB or 1 GiB took as long
    (4 GB on ext4: 0.6 s), and an fsync beside it waited as long (40 to 60 ms).

    Args:
        root: the checkpoints folder.
    """

    def __init__(self, root: Path, *, files_per_s: float = FILES_PER_S) -> None:
        self._root, self._pause_s = root, 1.0 / files_per_s
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._asked = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Have deleted what is trash now; returns at once."""
        with self._lock:
            self._asked = True
            if self._thread is None:
                # A daemon: the process may end at any moment, and whoever comes next sweeps what is left.
                self._thread = threading.Thread(target=self._run, name="checkpoint-remover", daemon=True)
                self._thread.start()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait until the trash is gone, deleting at full speed from now on; whether it is."""
        with self._lock:
            thread = self._thread
            if thread is None:
                return True
            self._hurry.set()
        thread.join(timeout_s)
        return not thread.is_alive()

    def _run(self) -> None:
        while self._is_asked():
            try:
                folders.settle_leaving(self._root)
                for folder in folders.trash(self._root):
                    self._empty(folder)
            except OSError as error:
                _log.warning("deleted checkpoints still take space: %s: %s", error.filename, error.strerror)

    def _is_asked(self) -> bool:
        """Whether `wake` was called since the last time; the thread ends when not."""
        with self._lock:
            asked, self._asked = self._asked, False
            if not asked:
                self._thread = None
                self._hurry.clear()
            return asked

    def _empty(self, folder: Path) -> None:
        """Delete a folder; another process may be doing so, too."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):
                    _unlink(folder / name)
                self._hurry.wait(self._pause_s)
            os.rmdir(folder)


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except IsADirectoryError:  # none of ours
        shutil.rmtree(path)
