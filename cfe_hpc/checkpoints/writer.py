"""`python -m cfe_hpc.checkpoints.writer SOCKET_FD ARENA_FD PARENT_PID`: writes out what a rank has put into its arena.

One for each rank, started once, on the same node. It takes one request at a time and answers each: `write` a data
file and its index, and, of rank 0's writer, `commit` a draft that all writers have filled. It dies with its rank, at
whatever moment that is killed; no signal that means stop to a rank stops it, for a stop waits for the save in flight.
It never loads torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import drafts
from cfe_hpc.checkpoints.agree import reason
from cfe_hpc.checkpoints.manifest import Manifest, ShardIndex, index_name
from cfe_hpc.checkpoints.rotation import Retention, rotate
from cfe_hpc.checkpoints.staging import Arena, Staged

__all__ = ["HELD_SIGNALS", "MESSAGE_BYTES", "main"]

HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler or a terminal sends to every process of a job."""

MESSAGE_BYTES = 1 << 16
"""No request or answer is longer; what is (indexes, manifests) goes through the arena."""

_PR_SET_PDEATHSIG = 1
_NICE = 5
_REASON_CHARS = 2000


def main(socket_fd: int, arena_fd: int, parent: int) -> None:
    """Answer requests until the rank closes its end. Replaces nothing in this process but signals and priority."""
    _die_with(parent)
    for number in HELD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Waking up in time keeps the disk busy and takes little; the kernel derives the I/O priority from this, too.
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    arena = Arena(arena_fd)
    with socket.socket(fileno=socket_fd) as rank, contextlib.suppress(ConnectionError):
        while request := rank.recv(MESSAGE_BYTES):
            rank.send(json.dumps(_answer(arena, json.loads(request))).encode())


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be heard of
        os._exit(1)


def _answer(arena: Arena, request: Mapping[str, Any]) -> dict[str, Any]:
    act = _write if request["do"] == "write" else _commit
    try:
        return act(arena, request)
    except Exception as error:  # any failure at all is the rank's to deal with
        return {"failed": reason(error)[:_REASON_CHARS]}


def _write(arena: Arena, request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the arena's first `data_bytes` as a data file; the `index_bytes` after them are its unwritten index."""
    data_bytes = request["data_bytes"]
    content = arena.view(data_bytes + request["index_bytes"])
    index = ShardIndex.unseal(bytes(content[data_bytes:]), index_name(request["rank"]))
    return {"facts": drafts.write_shard(Path(request["draft"]), index, Staged(content[:data_bytes])).decode()}


def _commit(arena: Arena, request: Mapping[str, Any]) -> dict[str, Any]:
    """Commit the draft whose manifest is the arena's first `manifest_bytes`, then rotate older checkpoints away."""
    manifest = Manifest.unseal(bytes(arena.view(request["manifest_bytes"])))
    root = Path(request["root"])
    drafts.commit(root, Path(request["draft"]), manifest)
    durable_s = time.monotonic()
    _rotate(root, request["policy"], request["protect"])
    return {"durable_s": durable_s}


def _rotate(root: Path, policy: Mapping[str, Any], protect: list[int]) -> None:
    try:
        rotate(root, Retention(**policy), protect=protect)
    except OSError as error:
        print(f"cfe_hpc: older checkpoints were not deleted: {reason(error)}", file=sys.stderr)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
