"""How the writer of rank 0 hears from the others that their shards are written: over a connection from each.

Training has no part in it, so that a checkpoint is committed while a step goes on. It works over nodes that share no
more than the filesystem and a network; no folder is polled.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping

from cfe_hpc.checkpoints.agree import raised
from cfe_hpc.checkpoints.beside.links import GREETING_S, Listener, greet, receive, send
from cfe_hpc.checkpoints.beside.pulse import PULSE_S, SILENCE_S
from cfe_hpc.errors import CheckpointError

__all__ = ["Hub", "Spoke"]

_LIMIT_BYTES = 1 << 16
_TOLD_LIMIT_BYTES = 1 << 28
"""A manifest has two files for each rank."""
_HEARING_S = 3600.0
"""Until rank 0's writer has heard that all shards lie on their nodes: what it waits for gets on, or is given up."""


def _save(token: str) -> str:
    """The token of a save whose stage `token` may be: its first word. A save may go on when a stage has failed."""
    return token.split()[0]


class Hub:
    """The end of rank 0's writer.

    Attributes:
        port: where it listens.
    """

    def __init__(self, secret: bytes) -> None:
        """Listen. Raises OSError."""
        self._news = threading.Condition()
        self._links: dict[int, socket.socket] = {}
        self._said: dict[tuple[str, int], dict[str, str]] = {}
        self._heard_s: dict[int, float] = {}
        self.port = Listener(secret, self._listen, name="checkpoint-hub").port

    def _listen(self, link: socket.socket) -> None:
        """Hear everything that one writer says, until it ends."""
        rank = int(receive(link, _LIMIT_BYTES))
        with self._news:
            self._links[rank] = link
        send(link, b"")
        try:
            while True:
                said = json.loads(receive(link, _LIMIT_BYTES))
                with self._news:
                    self._heard_s[rank] = time.monotonic()
                    if said:  # and not only that it gets on
                        self._said[said.pop("token"), rank] = said
                    self._news.notify()
        finally:
            with self._news:
                if self._links.get(rank) is link:  # and not that of the process that came after it
                    del self._links[rank]
                self._news.notify()

    def gather(self, token: str, mine: str, size: int, beat: Callable[[], None]) -> list[bytes]:
        """What each rank's writer says of the save of `token`, by rank; `mine` is rank 0's. One save at a time.

        A stage of a save is told by a token of its own: that of the save, and another word.

        Args:
            beat: called again and again meanwhile.

        Raises:
            CheckpointError: a writer has failed, or has ended before it said so; or it has told for SILENCE_S seconds
                neither that nor that it gets on.
        """
        began_s = time.monotonic()
        with self._news:
            self._said[token, 0] = {"facts": mine}
            while any((token, rank) not in self._said for rank in range(size)):
                self._refuse_failed(token, size)
                self._refuse_silent(token, size, began_s)
                self._news.wait(PULSE_S)
                beat()
            self._refuse_failed(token, size)
            facts = [self._said[token, rank]["facts"].encode() for rank in range(size)]
            self._said.clear()
        return facts

    def tell(self, token: str, **what: str) -> None:
        """Tell every other writer something of the save of `token`."""
        content = json.dumps({"token": token, **what}).encode()
        with self._news:
            links = list(self._links.values())
        for link in links:
            with contextlib.suppress(OSError):  # it has ended: its rank notices
                send(link, content)

    def _refuse_silent(self, token: str, size: int, began_s: float) -> None:
        for rank in range(1, size):
            silent_s = time.monotonic() - max(began_s, self._heard_s.get(rank, 0.0))
            if (token, rank) not in self._said and silent_s > SILENCE_S:
                raise CheckpointError(f"rank {rank}: its writer has moved nothing for {SILENCE_S:g} s")

    def _refuse_failed(self, token: str, size: int) -> None:
        for rank in range(size):
            said = self._said.get((token, rank)) or self._said.get((_save(token), rank))
            if said is None and rank not in self._links:
                said = {"failed": "its writer process has ended", "kind": CheckpointError.__name__}
            if said is not None and "failed" in said:
                raise raised(said["kind"], f"rank {rank}: {said['failed']}")


class Spoke:
    """The end of another rank's writer."""

    def __init__(self, address: tuple[str, int], secret: bytes, rank: int) -> None:
        """Connect. Raises OSError, EOFError, CheckpointError."""
        self._sending = threading.Lock()
        self._link = socket.create_connection(address, timeout=GREETING_S)
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greet(self._link, secret)
        self._link.settimeout(None)
        send(self._link, str(rank).encode())
        receive(self._link, 0)  # it knows

    def say(self, token: str, **what: str) -> None:
        """Tell rank 0's writer `facts`, or why this rank has `failed` and the `kind` of error. Raises OSError."""
        self._send({"token": token, **what})

    def beat(self) -> None:
        """Tell rank 0's writer that this one gets on; from any thread. Raises OSError."""
        self._send({})

    def _send(self, what: Mapping[str, str]) -> None:
        with self._sending:
            send(self._link, json.dumps(what).encode())

    def hear(self, token: str, beat: Callable[[], None]) -> dict[str, str]:
        """What rank 0's writer tells of the save of `token`, waited for; what it told of others is passed over.

        Args:
            beat: called again and again meanwhile.

        Raises:
            CheckpointError: the save has failed there, or the writer has ended, or tells nothing for _HEARING_S.
        """
        began_s = time.monotonic()
        while True:
            while not select.select([self._link], [], [], PULSE_S)[0]:
                beat()
                if time.monotonic() - began_s > _HEARING_S:
                    raise CheckpointError(f"rank 0: its writer has told nothing for {_HEARING_S:g} s")
            try:
                told = json.loads(receive(self._link, _TOLD_LIMIT_BYTES))
            except (OSError, EOFError) as error:
                raise CheckpointError("rank 0's writer process has ended") from error
            if told["token"] in (token, _save(token)) and "failed" in told:
                raise raised(told["kind"], told["failed"])
            if told["token"] == token:
                return {str(key): str(value) for key, value in told.items()}

    def close(self) -> None:
        """Hang up."""
        self._link.close()
