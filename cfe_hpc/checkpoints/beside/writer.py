"""`python -m cfe_hpc.checkpoints.beside.writer SOCKET_FD ARENA_FD PARENT_PID`: writes out what lies in a rank's arena.

One for each rank, started once, on the same node. It takes one request at a time and answers each. The writers of an
attempt know each other: when all have written their shards of a save, rank 0's commits it, whatever training does at
that time. A writer dies with its rank, at whatever moment that is killed; no signal that means stop to a rank stops
it, for a stop waits for the save in flight. It never loads torch.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import drafts
from cfe_hpc.checkpoints.agree import kind_of, reason
from cfe_hpc.checkpoints.beside.company import Company
from cfe_hpc.checkpoints.beside.nodewriter import NodeWriter, manifest_of, staged
from cfe_hpc.checkpoints.beside.tidying import Tidying
from cfe_hpc.checkpoints.io.hugepages import HugePages
from cfe_hpc.checkpoints.io.shard import NewFile
from cfe_hpc.checkpoints.io.staging import Arena, Staged
from cfe_hpc.checkpoints.manifest import ShardIndex, data_name
from cfe_hpc.errors import CfeError

__all__ = ["HELD_SIGNALS", "MESSAGE_BYTES", "main", "serve"]

HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler or a terminal sends to every process of a job."""

MESSAGE_BYTES = 1 << 16
"""No request or answer is longer; what is (indexes, plans) goes through the arena."""

Act = Callable[[Mapping[str, Any]], dict[str, Any]]

_PR_SET_PDEATHSIG = 1
_NICE = 7
_REASON_CHARS = 2000


def main(socket_fd: int, arena_fd: int, parent: int) -> None:
    """Answer requests until the rank closes its end. Replaces nothing in this process but signals and priority."""
    rank = socket.socket(fileno=socket_fd)
    arena, others, tidying, pages = Arena(arena_fd), Company(rank), Tidying(), HugePages()
    writer, node = _Writer(arena, others, tidying, pages), NodeWriter(arena, others)
    acts: dict[str, Act] = {
        "listen": others.listen,
        "join": others.join,
        "give_up": writer.give_up,
        "attach": writer.attach,
        "open": pages.held(writer.open),
        "write": pages.held(writer.write),
        "receive": node.receive,
        "write_to_node": pages.held(node.write),
    }
    serve(rank, parent, acts, nice=_NICE, afterwards=tidying.tidy)


def serve(
    rank: socket.socket,
    parent: int,
    acts: Mapping[str, Act],
    *,
    nice: int,
    afterwards: Callable[[], None] | None = None,
) -> None:
    """Answer a rank's requests, one at a time, by the act that each names, until the rank closes its end. What an act
    answers is sent unless it is empty.

    Args:
        rank: the connection to it.
        parent: the rank's process id: this process dies with it.
        afterwards: called after each answer, for what nobody waits for.
    """
    _die_with(parent)
    for number in HELD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Waking up in time keeps the disk busy and takes little; the kernel derives the I/O priority from this, too.
    with contextlib.suppress(OSError):
        os.nice(nice)
    with rank, contextlib.suppress(ConnectionError):
        while content := rank.recv(MESSAGE_BYTES):
            request = json.loads(content)
            answer = _answer(acts[request["do"]], request)
            if answer:
                rank.send(json.dumps(answer).encode())
            if afterwards is not None:
                afterwards()


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be heard of
        os._exit(1)


def _answer(act: Act, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return act(request)
    except Exception as error:  # any failure at all is the rank's to deal with
        return {"failed": reason(error)[:_REASON_CHARS], "kind": kind_of(error)}


class _Writer:
    """What a writer keeps between requests."""

    def __init__(self, arena: Arena, others: Company, tidying: Tidying, pages: HugePages) -> None:
        self._arena, self._others, self._tidying, self._pages = arena, others, tidying, pages
        self._file: NewFile | None = None

    def attach(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have the arena's pages mapped before the first save asks for them."""
        self._arena.view(request["size_bytes"])
        if not request["stays"]:  # pages that are huge already, or that nobody can move
            self._pages.gather(self._arena.memory)
        return {"attached": True}

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Make the draft and this rank's data file in it, for a `write` that follows and tells what is the matter; no
        answer, for the rank does not wait for a disk.

        To find room for the file the filesystem may have to look at the disk, which keeps a question waiting as soon as
        another rank's shard is on its way there.
        """
        with contextlib.suppress(OSError, CfeError):
            self._open(request)
        return {}

    def _open(self, request: Mapping[str, Any]) -> None:
        self._close()
        draft, rank = Path(request["draft"]), request["rank"]
        drafts.enter(draft, rank, request["needed_bytes"])
        self._file = NewFile(draft / data_name(rank), request["data_bytes"])

    def _close(self) -> None:
        """Leave a file that was opened in vain: its rank has given up."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def give_up(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """As Company.give_up."""
        self._close()
        return self._others.give_up(request)

    def write(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write this rank's shard: a data file, its unwritten index and (rank 0) a plan lie in the arena, in turn.

        Rank 0's answer comes when the checkpoint is committed, the others' when they are done.
        """
        data, index, plan = staged(self._arena, request, self._others.beat)
        rank, token = index.rank, index.identity.token
        try:
            facts = self._written(request, index, data)
        except Exception as error:
            if rank != 0:
                self._others.give_up({"token": token, "why": reason(error), "kind": kind_of(error)})
            raise
        if rank != 0:
            self._others.say(token, facts=facts)
            return {"written": True}
        draft = Path(request["draft"])
        manifest = manifest_of(index, plan, self._others.gather(token, facts, index.identity.world_size))
        drafts.commit(draft.parent, draft, manifest)
        self._tidying.due(draft.parent, plan["policy"], plan["protect"])
        return {"durable_s": time.monotonic(), "size_bytes": manifest.size_bytes}

    def _written(self, request: Mapping[str, Any], index: ShardIndex, data: Staged) -> str:
        """Write the shard; what the manifest says of it."""
        draft = Path(request["draft"])
        if self._file is None or self._file.path.parent != draft:
            self._open(request)  # nobody has, or in vain: this raises what is the matter
        file, self._file = self._file, None
        return drafts.write_shard(draft, index, data, file=file).decode()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
