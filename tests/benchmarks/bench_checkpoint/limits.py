"""What the machine can do at best: copy, durable write and cold read of the same bytes, by all ranks at once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from bench_checkpoint import files
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
