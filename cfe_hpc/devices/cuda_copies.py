"""Copies from an NVIDIA device into this process's memory while it computes: pinned memory, and a stream beside.

Tested against a fake of torch.cuda that records order; never executed on a device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfe_hpc.checkpoints.protocols import OnDevice

__all__ = ["CudaCopies"]

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of this process."""

_MARKED_BYTES = 64 << 20
"""How far apart a reader of the copies is told where they are."""


class CudaCopies:
    """See checkpoints.protocols.HostCopies for each call's contract.

    References keep the memory of what is copied until the copies are done, not record_stream: that one is for memory
    which is freed earlier, and has the allocator ask the device again and again whether it may be reused.
    """

    def __init__(self, cuda: Any = None, device: str = "cuda") -> None:
        """`cuda` is torch.cuda when left out; a test has another, and another `device` for what is made there."""
        self._given, self._device = cuda, device
        self._streams: dict[Any, Any] = {}
        self._lock = threading.Lock()  # nothing is asked of memory while it is being unpinned

    @property
    def _cuda(self) -> Any:
        if self._given is None:
            import torch

            self._given = torch.cuda
        return self._given

    def pin(self, address: int, size_bytes: int) -> None:
        cudart = self._cuda.cudart()
        code = cudart.cudaHostRegister(address, size_bytes, _PORTABLE)
        if int(code) != 0:
            self._forget_error()
            raise OSError(f"cudaHostRegister: {cudart.cudaGetErrorString(code)}")

    def unpin(self, address: int) -> None:
        with self._lock:
            for stream in self._streams.values():
                with contextlib.suppress(RuntimeError):  # a device that is lost copies nothing any more
                    stream.synchronize()
            if int(self._cuda.cudart().cudaHostUnregister(address)) != 0:
                self._forget_error()

    def _forget_error(self) -> None:
        """The runtime remembers a refusal, and torch raises it at whoever's kernel comes next: let that be ours."""
        import torch

        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def boundary(self, devices: Iterable[Any]) -> dict[Any, Any]:
        return {device: self._cuda.current_stream(device).record_event() for device in devices}

    def fetch(self, tasks: Sequence[tuple[OnDevice, memoryview]], after: dict[Any, Any]) -> Iterator[int]:
        used: list[Any] = []
        try:
            with self._lock:
                marks = list(self._enqueue(tasks, after, used))
            for count, event in marks:
                event.synchronize()
                yield count
        finally:  # whatever has failed: nobody may reuse the memory at either end before
            for stream in used:
                stream.synchronize()

    def _enqueue(
        self, tasks: Sequence[tuple[OnDevice, memoryview]], after: dict[Any, Any], used: list[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Give the device the copies; with each event, how many of them are done when those before it and it are.

        Args:
            used: gets the streams that they are on.
        """
        import torch

        count = 0
        for device, group in groupby(tasks, lambda task: task[0].device):
            if device not in self._streams:
                self._streams[device] = self._cuda.Stream(device)
            stream = self._streams[device]
            if stream not in used:
                used.append(stream)
                stream.wait_event(after[device])
            marked_bytes = 0
            with self._cuda.stream(stream):
                for source, out in group:
                    # What `flat` may have to make is of this stream, too: its memory serves nobody before the copy.
                    torch.frombuffer(out, dtype=torch.uint8).copy_(source.flat(), non_blocking=True)
                    count += 1
                    marked_bytes += len(out)
                    if marked_bytes >= _MARKED_BYTES:
                        yield count, self._mark(stream)
                        marked_bytes = 0
                yield count, self._mark(stream)

    def _mark(self, stream: Any) -> Any:
        event = self._cuda.Event(blocking=True)  # its waiter leaves the core to others
        event.record(stream)
        return event
