"""Connections between the writer processes of one attempt: who is let in, and messages over them.

    who listens: 32 random bytes        who connects: 32 random bytes, HMAC(secret, "connect", both)
    who listens: HMAC(secret, "listen", both)

Both prove that they know the attempt's secret, neither shows it. Messages are a length and that many bytes.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct

from cfe_hpc.errors import CheckpointError

__all__ = ["SECRET_BYTES", "fill", "greet", "let_in", "receive", "send"]

SECRET_BYTES = 32
_NONCE_BYTES = 32
_LENGTH = struct.Struct("<q")


def let_in(link: socket.socket, secret: bytes) -> bool:
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
