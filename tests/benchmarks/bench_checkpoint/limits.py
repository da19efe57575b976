"""What the machine can do at best: copy, durable write and cold read of the same bytes, by all ranks at once."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench_checkpoint import files
from bench_checkpoint.beside import Training, save_beside
from cfe_hpc.checkpoints.io.memory import page_buffer


class Limits:
    """This rank's part of the bare operations, with memory of its own that is there already."""

    def __init__(self, tensors: list[torch.Tensor], group: Any) -> None:
        self._tensors, self._group = tensors, group
        total = sum(tensor.nbytes for tensor in tensors)
        # Huge pages where there are any: a disk is faster with them.
        self._memory = page_buffer(-(-total // files.CHUNK_BYTES) * files.CHUNK_BYTES)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._bytes.fill_(1)
        self.size_bytes = total

    def copy(self, threads: int) -> float:
        """Seconds of one copy of the tensors."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._group.barrier()
        started, at = time.monotonic(), 0
        for tensor in self._tensors:
            self._bytes[at : at + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
            at += tensor.nbytes
        seconds = time.monotonic() - started
        torch.set_num_threads(before)
        return seconds

    def write(self, folder: Path, *, direct: bool) -> float:
        """Seconds of a durable write of as many bytes."""
        path = folder / f"bare-{self._group.rank}"
        content = self._memory[: -(-self.size_bytes // 4096) * 4096]
        self._start()
        started = time.monotonic()
        files.write(path, content, direct=direct)
        return time.monotonic() - started

    def write_beside(self, folder: Path, training: Training, forward_backward_s: float) -> dict[str, Any]:
        """A bare durable write of as many bytes, past the page cache, while training goes on: its figures as a save."""
        content = self._memory[: -(-self.size_bytes // 4096) * 4096]
        way = _BareWrite(f"bare-{self._group.rank}", content)
        os.sync()
        return save_beside(
            training, way, folder, self._group, forward_backward_s=forward_backward_s, each_step=lambda: None
        )

    def read(self, folder: Path, *, direct: bool) -> float:
        """Seconds of a cold read of the file that `write` made."""
        path = folder / f"bare-{self._group.rank}"
        content = self._memory[: -(-self.size_bytes // 4096) * 4096]
        files.forget(folder)
        self._start()
        started = time.monotonic()
        files.read(path, content, direct=direct)
        return time.monotonic() - started

    def _start(self) -> None:
        os.sync()
        self._group.barrier()


class _BareWrite:
    """A file written on a thread, without a copy and without checksums; a `beside.Asynchronous`."""

    def __init__(self, name: str, content: memoryview) -> None:
        self._name, self._content = name, content
        self._thread: threading.Thread | None = None
        self._durable_s = 0.0

    def begin(self, folder: Path) -> None:
        def write() -> None:
            files.write(folder / self._name, self._content, direct=True)
            self._durable_s = time.monotonic()

        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()

    def await_staged(self) -> None:
        pass

    def staged_s(self) -> float | None:
        return None

    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def advance(self, busy: bool) -> float | None:
        return None if busy else self._durable_s
