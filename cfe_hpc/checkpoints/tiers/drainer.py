"""`python -m cfe_hpc.checkpoints.tiers.drainer SOCKET_FD ARENA_FD PARENT_PID`: takes a rank's shards off its node.

One for each rank, beside its writer, so that a newer checkpoint can be written to the node while an older one is
still on its way. When the shards of a save are all there, rank 0's commits it, as writers do. It takes one request at
a time and answers each, and dies with its rank.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.agree import kind_of, reason
from cfe_hpc.checkpoints.beside.company import Company
from cfe_hpc.checkpoints.beside.tidying import Tidying
from cfe_hpc.checkpoints.beside.writer import serve
from cfe_hpc.checkpoints.manifest import Manifest
from cfe_hpc.checkpoints.reader import read_manifest_bytes
from cfe_hpc.checkpoints.tiers import nodelocal, places
from cfe_hpc.checkpoints.tiers.transfer import copy_shard

__all__ = ["main"]

_NICE = 10


def main(socket_fd: int, arena_fd: int, parent: int) -> None:
    """Answer requests until the rank closes its end."""
    os.close(arena_fd)  # what it works on lies in files
    rank = socket.socket(fileno=socket_fd)
    others, tidying = Company(rank), Tidying()
    drainer = _Drainer(others, tidying)
    acts = {
        "listen": others.listen,
        "join": others.join,
        "drain": drainer.drain,
        "keep": drainer.keep,
    }
    serve(rank, parent, acts, nice=_NICE, afterwards=tidying.tidy)


class _Drainer:
    """What a drainer keeps between requests."""

    def __init__(self, others: Company, tidying: Tidying) -> None:
        self._others, self._tidying = others, tidying

    def drain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Copy this rank's shard from its node's `folder` into `draft`.

        Rank 0's answer comes when the checkpoint is committed, the others' when they are done.
        """
        rank, draft, folder = request["rank"], Path(request["draft"]), Path(request["folder"])
        token = request["token"]
        try:
            manifest = Manifest.unseal(read_manifest_bytes(folder))
            drafts.enter(draft, rank, manifest.size_bytes)
            copy_shard(folder, draft, rank, manifest, self._others.beat)
        except Exception as error:
            self._others.give_up({"token": token, "why": reason(error), "kind": kind_of(error)})
            raise
        if rank != 0:
            self._others.say(token, facts="")
            return {"copied": True}
        self._others.gather(token, "", manifest.identity.world_size)
        drafts.commit(draft.parent, draft, manifest)
        self._tidying.due(draft.parent, request["policy"], request["protect"])
        return {"durable_s": time.monotonic(), "size_bytes": manifest.size_bytes}

    def keep(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Delete copies that this node needs no more; one drainer of each node is asked.

        Args (of the request): `durable` and `drop` are folders, or null: a copy that the shared filesystem has now,
        and one of a save that failed. `record` is the checkpoints folder, for rank 0's to note what is gone, or null.
        """
        home = Path(request["home"])
        if request["drop"] is not None:
            folders.discard(Path(request["drop"]))
        if request["durable"] is not None and Path(request["durable"]).is_dir():
            nodelocal.mark_durable(Path(request["durable"]))
        gone = nodelocal.evict(home, request["keep_last"], request["attempt"])
        if request["record"] is not None:
            for step in gone:
                places.record(Path(request["record"]), step, request["attempt"], "local", [request["host"]], gone=True)
        if request["sweep"]:
            nodelocal.sweep_others(home)
        return {"evicted": gone}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
