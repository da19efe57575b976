"""Groups of ranks for tests: threads of one process, and processes joined by sockets."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any


class ThreadGroup:
    """One rank of a group whose ranks are threads; `run_ranks` makes them."""

    def __init__(self, rank: int, size: int, board: list[Any], gate: threading.Barrier) -> None:
        self.rank, self.size, self._board, self._gate = rank, size, board, gate

    def _exchange(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._gate.wait(60)
        values = list(self._board)
        self._gate.wait(60)
        return values

    def all_max(self, values: Sequence[int]) -> list[int]:
        return [max(column) for column in zip(*self._exchange(list(values)), strict=True)]

    def all_gather(self, data: bytes) -> list[bytes]:
        return self._exchange(bytes(data))

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        return self._exchange(bytes(data))[source]

    def barrier(self) -> None:
        self._exchange(None)


def run_ranks(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `work` returned or raised on each of `size` ranks, by rank."""
    board, gate = [None] * size, threading.Barrier(size)
    outcomes: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadGroup(rank, size, board, gate))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def all_good(outcomes: list[Any]) -> list[Any]:
    """The outcomes, when no rank raised."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


class SocketGroup:
    """One rank of a group of processes: rank 0 has a stream socket to each other rank, they have one to it."""

    def __init__(self, rank: int, size: int, links: Sequence[socket.socket]) -> None:
        self.rank, self.size, self._links = rank, size, links

    def all_gather(self, data: bytes) -> list[bytes]:
        if self.rank:
            _send(self._links[0], data)
            return [_receive(self._links[0]) for _ in range(self.size)]
        values = [data, *(_receive(link) for link in self._links)]
        for link in self._links:
            for value in values:
                _send(link, value)
        return values

    def all_max(self, values: Sequence[int]) -> list[int]:
        packed = self.all_gather(struct.pack(f"<{len(values)}q", *values))
        return [max(column) for column in zip(*(struct.unpack(f"<{len(values)}q", one) for one in packed), strict=True)]

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        return self.all_gather(data)[source]

    def barrier(self) -> None:
        self.all_gather(b"")


def _send(link: socket.socket, data: bytes) -> None:
    link.sendall(struct.pack("<q", len(data)) + data)


def _receive(link: socket.socket) -> bytes:
    (size,) = struct.unpack("<q", _exactly(link, 8))
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = link.recv(size - len(parts))
        if not part:
            raise ConnectionError("a rank has gone")
        parts += part
    return bytes(parts)
