"""Connections between the writer processes of one attempt: who is let in, and messages over them.

    who listens: 32 random bytes        who connects: 32 random bytes, HMAC(secret, "connect", both)
    who listens: HMAC(secret, "listen", both)

Both prove that they know the attempt's secret, neither shows it. Messages are a length and that many bytes.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
from collections.abc import Callable

from cfe_hpc.errors import CheckpointError

__all__ = ["GREETING_S", "SECRET_BYTES", "Listener", "fill", "greet", "receive", "send"]

SECRET_BYTES = 32
GREETING_S = 10.0
"""Whoever has not greeted by then is not let in."""

_BACKLOG = 1024
_NONCE_BYTES = 32
_LENGTH = struct.Struct("<q")


class Listener:
    """Lets in those who know the secret, each on a thread of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, secret: bytes, serve: Callable[[socket.socket], None], *, name: str) -> None:
        """Listen, on every address: which of them others come by, the node's name does not tell.

        Args:
            serve: called with each connection, which closes when it returns; an OSError, EOFError or CheckpointError
                of its ends that connection alone.
            name: of the threads.

        Raises:
            OSError: there is no port.
        """
        self._secret, self._serve, self._name = secret, serve, name
        self._listener = socket.create_server(("", 0), backlog=_BACKLOG)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name=name, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                link, _ = self._listener.accept()
                threading.Thread(target=self._greet_and_serve, args=(link,), name=self._name, daemon=True).start()

    def _greet_and_serve(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError, EOFError, CheckpointError):
            link.settimeout(GREETING_S)
            if _let_in(link, self._secret):
                link.settimeout(None)
                self._serve(link)

    def close(self) -> None:
        """Listen no more; connections go on."""
        # Closing alone would leave the thread in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _let_in(link: socket.socket, secret: bytes) -> bool:
    """The listening side of the greeting; whether the other end knows the secret. Raises OSError, EOFError."""
    mine = secrets.token_bytes(_NONCE_BYTES)
    link.sendall(mine)
    its = _exactly(link, _NONCE_BYTES)
    proof = _exactly(link, hmac.new(secret, digestmod="sha256").digest_size)
    if not hmac.compare_digest(proof, _proof(secret, b"connect", mine, its)):
        return False
    link.sendall(_proof(secret, b"listen", mine, its))
    return True


def greet(link: socket.socket, secret: bytes) -> None:
    """The connecting side.

    Raises:
        CheckpointError: the other end does not know the secret.
        OSError, EOFError: the connection failed.
    """
    its = _exactly(link, _NONCE_BYTES)
    mine = secrets.token_bytes(_NONCE_BYTES)
    link.sendall(mine + _proof(secret, b"connect", its, mine))
    wanted = _proof(secret, b"listen", its, mine)
    if not hmac.compare_digest(_exactly(link, len(wanted)), wanted):
        raise CheckpointError("what listens there is no rank of this attempt")


def _proof(secret: bytes, role: bytes, listeners: bytes, connectors: bytes) -> bytes:
    return hmac.new(secret, role + listeners + connectors, "sha256").digest()


def send(link: socket.socket, content: bytes) -> None:
    """Send a message."""
    link.sendall(_LENGTH.pack(len(content)) + content)


def receive(link: socket.socket, limit_bytes: int) -> bytes:
    """A message. Raises CheckpointError when it is announced longer than `limit_bytes`; EOFError, OSError."""
    (size_bytes,) = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    if not 0 <= size_bytes <= limit_bytes:
        raise CheckpointError(f"{size_bytes} bytes were announced where at most {limit_bytes} make sense")
    return _exactly(link, size_bytes)


def fill(link: socket.socket, out: memoryview) -> None:
    """Fill `out` with the next bytes. Raises EOFError when the other end sends no more; OSError."""
    while out:
        got = link.recv_into(out)
        if not got:
            raise EOFError("the connection was closed")
        out = out[got:]


def _exactly(link: socket.socket, size_bytes: int) -> bytes:
    content = bytearray(size_bytes)
    fill(link, memoryview(content))
    return bytes(content)
