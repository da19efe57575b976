"""torch.cuda as cfe_hpc.devices.cuda_copies uses it: streams that do things later, on threads, and say in which order.

What is copied from is a tensor on the CPU that says it is not: `Moved`. It imitates order, not the hardware.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

REFUSED = 1


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self._done = threading.Event()

    def record(self, stream: Stream) -> None:
        stream.do(self._done.set)

    def synchronize(self) -> None:
        assert self._done.wait(30)


class Stream:
    """Does one thing after the other, on a thread of its own."""

    def __init__(self, device: Any) -> None:
        self._asked: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def do(self, act: Callable[[], object]) -> None:
        self._asked.put(act)

    def _work(self) -> None:
        while True:
            self._asked.get()()

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.do(event.synchronize)

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Cuda:
    """The module.

    Attributes:
        compute: the stream that training uses.
        log: what has been done, in order.
        refuses: whether no memory can be pinned.
        pinned: addresses of what is.
        copy_s: how long each copy takes.
    """

    Event = Event

    def __init__(self) -> None:
        self.compute = Stream("dev")
        self.log: list[str] = []
        self.refuses = False
        self.pinned: set[int] = set()
        self.copy_s = 0.0
        self._own = threading.local()

    def Stream(self, device: Any) -> Stream:
        return Stream(device)

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._own, "stream", self.compute)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._own.stream = stream
        yield
        del self._own.stream

    def cudart(self) -> Cuda:
        return self

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        assert (address % 4096, flags) == (0, 1)
        assert is_mapped(address, size_bytes)
        if self.refuses:
            return REFUSED
        self.log.append("pin")
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert is_mapped(address, 4096)
        self.log.append("unpin")
        self.pinned.remove(address)
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


def is_mapped(address: int, size_bytes: int) -> bool:
    """Whether all of it is memory of this process that can be written to."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            where, rights = line.split()[:2]
            begin, end = (int(each, 16) for each in where.split("-"))
            if begin <= address and address + size_bytes <= end:
                return "w" in rights
    return False


class Moved(torch.Tensor):
    """A tensor whose copies to elsewhere the current stream makes; those that wait for it wait."""

    cuda: Cuda

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return super().__torch_function__(func, types, args, kwargs or {})
        out, source = args
        cuda, plain = source.cuda, source.as_subclass(torch.Tensor)

        def act() -> None:
            time.sleep(cuda.copy_s)
            ctypes.memmove(out.data_ptr(), plain.data_ptr(), len(plain))
            cuda.log.append("copy")

        stream = cuda.current_stream()
        stream.do(act)
        if not (kwargs or {}).get("non_blocking"):
            stream.synchronize()
        return out


class Bytes:
    """A protocols.OnDevice."""

    device = "dev"

    def __init__(self, cuda: Cuda, content: torch.Tensor) -> None:
        self.cuda, self.content, self.nbytes = cuda, content, len(content)

    def flat(self) -> torch.Tensor:
        moved = self.content.as_subclass(Moved)
        moved.cuda = self.cuda
        return moved

    def copy_to(self, out: memoryview) -> None:
        torch.frombuffer(out, dtype=torch.uint8).copy_(self.flat())

    def on_host(self) -> memoryview:
        return memoryview(bytearray(self.content.numpy()))
