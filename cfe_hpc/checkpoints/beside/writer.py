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
from functools import partial
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import drafts
from cfe_hpc.checkpoints.agree import kind_of, reason
from cfe_hpc.checkpoints.beside.company import Company
from cfe_hpc.checkpoints.beside.datafile import DataFile
from cfe_hpc.checkpoints.beside.hand import Hand
from cfe_hpc.checkpoints.beside.nodewriter import NodeWriter, described, manifest_of
from cfe_hpc.checkpoints.beside.tidying import Tidying
from cfe_hpc.checkpoints.io.hugepages import HugePages
from cfe_hpc.checkpoints.io.staging import Arena
from cfe_hpc.checkpoints.manifest import ShardIndex

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
    arena, others, tidying, pages, hand = Arena(arena_fd), Company(rank), Tidying(), HugePages(), Hand("checkpoint")
    hand.do(_give_way)
    writer, node = _Writer(arena, others, tidying, pages, hand), NodeWriter(arena, others)
    acts: dict[str, Act] = {
        "listen": others.listen,
        "join": others.join,
        "give_up": writer.give_up,
        "attach": writer.attach,
        "open": writer.open,
        "write": writer.write,
        "receive": node.receive,
        "write_to_node": lambda request: hand.submit(partial(pages.held(node.write), request)).result(),
    }

    def tidy() -> None:
        hand.do(tidying.tidy)

    serve(rank, parent, acts, nice=0, afterwards=tidy)
    hand.close()


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


def _give_way() -> None:
    """Let training have the cores before this thread, and this thread alone: the rest of the process does little, and
    when it does, everybody waits for it."""
    # Waking up in time keeps the disk busy and takes little; the kernel derives the I/O priority from this, too.
    with contextlib.suppress(OSError):
        os.nice(_NICE)


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

    def __init__(self, arena: Arena, others: Company, tidying: Tidying, pages: HugePages, hand: Hand) -> None:
        """`hand` writes data files, and tidies."""
        self._arena, self._others, self._tidying, self._pages, self._hand = arena, others, tidying, pages, hand
        self._file: DataFile | None = None
        self._whole: list[str] = []  # the extents of each rank in the last checkpoint that was committed

    def attach(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have the arena's pages mapped before the first save asks for them."""
        self._arena.view(request["size_bytes"])
        if not request["stays"]:  # pages that are huge already, or that nobody can move
            self._pages.gather(self._arena.memory)
        return {"attached": True}

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Begin with this rank's data file, for a `write` that follows and tells what is the matter; no answer, for the
        rank does not wait for a disk."""
        self._leave()
        self._begin(request)
        return {}

    def _begin(self, request: Mapping[str, Any]) -> None:
        self._file = DataFile(request, self._arena, hand=self._hand, pages=self._pages, beat=self._others.beat)

    def _leave(self) -> None:
        """Leave a file that was begun in vain."""
        if self._file is not None:
            self._file.leave()
            self._file = None

    def give_up(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """As Company.give_up."""
        self._leave()
        return self._others.give_up(request)

    def write(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write this rank's shard: a data file, its unwritten index and (rank 0) a plan lie in the arena, in turn.

        Rank 0's answer comes when the checkpoint is committed, the others' when they are done.
        """
        index, plan = described(self._arena, request)
        rank, token = index.rank, index.identity.token
        try:
            told = self._written(request, index)
        except Exception as error:
            if rank != 0:
                self._others.give_up({"token": token, "why": reason(error), "kind": kind_of(error)})
            raise
        if rank != 0:
            self._others.say(token, facts=told)
            return {"written": True}
        draft = Path(request["draft"])
        all_told = [json.loads(each) for each in self._others.gather(token, told, index.identity.world_size)]
        manifest = manifest_of(index, plan, [facts.encode() for facts, _ in all_told])
        extents = [digest for _, digest in all_told]
        drafts.commit(draft.parent, draft, manifest, fits=extents == self._whole)
        self._whole = extents
        self._tidying.due(draft.parent, plan["policy"], plan["protect"])
        return {"durable_s": time.monotonic(), "size_bytes": manifest.size_bytes}

    def _written(self, request: Mapping[str, Any], index: ShardIndex) -> str:
        """Write the shard; what rank 0's writer must know of it: the manifest's facts, and a digest of its extents."""
        draft = Path(request["draft"])
        if self._file is None or self._file.draft != draft:
            self.open(request)  # nobody has
        assert self._file is not None
        begun, self._file = self._file, None
        digest = drafts.extents_digest(index)  # while the disk writes
        file, chunks = begun.result()
        return json.dumps([drafts.seal_shard(draft, index, file, chunks).decode(), digest])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
