"""A second copy of each shard on another node, sent from writer process to writer process.

The connection is for one shard, and begins as all of `links` do:

    sender: a message, JSON {folder, rank, data_bytes}; the data file; a message, the index file
    receiver: a message, JSON {} or {"failed": why}

The receiver sums what it has written and compares it with the index: what is acknowledged is there, synced and whole.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.agree import reason
from cfe_hpc.checkpoints.beside.links import Listener, fill, greet, receive, send
from cfe_hpc.checkpoints.io.shard import write_data, write_file
from cfe_hpc.checkpoints.io.staging import Staged
from cfe_hpc.checkpoints.layout import CHUNK_BYTES
from cfe_hpc.checkpoints.manifest import ShardIndex, data_name, index_name
from cfe_hpc.checkpoints.tiers.nodelocal import check_name, copy_name
from cfe_hpc.checkpoints.tiers.transfer import InOrder
from cfe_hpc.errors import CheckpointError

__all__ = ["Receiver", "Sending"]

_CONNECT_S = 5.0
_SILENCE_S = 30.0
"""A partner that moves no byte for so long is given up for this checkpoint."""
_POLL_S = 0.001
_HEADER_LIMIT_BYTES = 4096
_INDEX_LIMIT_BYTES = 1 << 30
_REASON_CHARS = 1000


class Receiver:
    """Takes shards from other nodes' ranks and writes them beside this node's own, on threads of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, home: Path, secret: bytes) -> None:
        """Listen. Raises OSError."""
        self._home = home
        self._listener = Listener(secret, self._serve, name="checkpoint-partner")
        self.port = self._listener.port

    def close(self) -> None:
        """Listen no more; what is being received is received."""
        self._listener.close()

    def _serve(self, link: socket.socket) -> None:
        link.settimeout(_SILENCE_S)
        send(link, json.dumps(self._answer(link)).encode())
        # The sender may be at it still: closing on what it sends would take the answer away from it.
        link.shutdown(socket.SHUT_WR)
        while link.recv(CHUNK_BYTES):
            pass

    def _answer(self, link: socket.socket) -> dict[str, Any]:
        try:
            _receive_shard(link, self._home)
            return {}
        except Exception as error:  # any failure at all is the sender's to tell of
            return {"failed": reason(error)[:_REASON_CHARS]}


def _receive_shard(link: socket.socket, home: Path) -> None:
    shard = json.loads(receive(link, _HEADER_LIMIT_BYTES))
    folder, rank, data_bytes = str(shard["folder"]), int(shard["rank"]), int(shard["data_bytes"])
    check_name(folder, rank)
    place = home / folder
    place.mkdir(mode=0o700, exist_ok=True)
    sums = write_data(place / data_name(rank), InOrder(data_bytes, partial(_fill_named, link)))
    content = receive(link, _INDEX_LIMIT_BYTES)
    index = ShardIndex.unseal(content, index_name(rank))
    if (copy_name(index.identity), index.rank) != (folder, rank):
        raise CheckpointError(f"{index_name(rank)} belongs to {copy_name(index.identity)}, rank {index.rank}")
    if index.chunks != sums:
        raise CheckpointError(f"{data_name(rank)} differs from what was sent")
    write_file(place / index_name(rank), content)


def _fill_named(link: socket.socket, out: memoryview) -> None:
    """An OSError here is not the file's."""
    try:
        fill(link, out)
    except OSError as error:
        raise CheckpointError(f"the sender's connection: {error}") from error


class Sending:
    """One shard on its way to the partner, from a thread of its own, while it is still being copied."""

    def __init__(self, to: Mapping[str, Any], secret: bytes, folder: str, rank: int, data: Staged) -> None:
        """Begin.

        Args:
            to: the partner's `host` and `port`.
            folder: the save's, as `nodelocal.copy_name` gives it.
            data: the data file; what is ready of it is not to be changed until `finish` or `abandon` returns.
        """
        self._given_up = threading.Event()
        self._pool = ThreadPoolExecutor(1, "checkpoint-partner")
        self._link = self._pool.submit(self._send_data, (to["host"], to["port"]), secret, folder, rank, data)

    def _send_data(self, to: tuple[str, int], secret: bytes, folder: str, rank: int, data: Staged) -> socket.socket:
        ends = [min(start + CHUNK_BYTES, data.size_bytes) for start in range(0, data.size_bytes, CHUNK_BYTES)]
        self._await(data, ends[0])  # the partner waits for no copy that has not begun
        link = socket.create_connection(to, timeout=_CONNECT_S)
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            greet(link, secret)
            link.settimeout(_SILENCE_S)
            send(link, json.dumps({"folder": folder, "rank": rank, "data_bytes": data.size_bytes}).encode())
            for start, end in zip([0, *ends], ends, strict=False):
                self._await(data, end)
                if _has_answered(link):
                    break
                link.sendall(data.content[start:end])  # its time limit is for all that one call sends
        except BaseException:
            link.close()
            raise
        return link

    def _await(self, data: Staged, end: int) -> None:
        """Wait until the bytes before `end` are there. Raises CheckpointError when they never will be."""
        while not (self._given_up.is_set() or data.ready(end)):
            time.sleep(_POLL_S)
        if self._given_up.is_set():
            raise CheckpointError("there is no shard to send")

    def finish(self, index: bytes) -> str | None:
        """Send the index file after the data, and hear what became of them.

        Returns:
            Why the partner has no copy; None when it has one, synced and whole.
        """
        try:
            with self._link.result() as link:
                if not _has_answered(link):
                    send(link, index)
                failed = json.loads(receive(link, _HEADER_LIMIT_BYTES)).get("failed")
            return None if failed is None else str(failed)
        except EOFError:
            return "the partner has closed the connection"
        except (OSError, ValueError, CheckpointError) as error:
            return reason(error)
        finally:
            self._pool.shutdown()

    def abandon(self) -> None:
        """Send no further: there is no shard after all."""
        self._given_up.set()
        with contextlib.suppress(OSError, EOFError, CheckpointError):
            self._link.result().close()
        self._pool.shutdown()


def _has_answered(link: socket.socket) -> bool:
    """Whether the receiver has something to say: before all is sent, that it takes no more."""
    return bool(select.select([link], [], [], 0)[0])
