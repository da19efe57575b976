"""`python -m cfe_hpc.checkpoints.writer SOCKET_FD ARENA_FD PARENT_PID`: writes out what a rank has put into its arena.

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
from cfe_hpc.checkpoints.hub import Hub, Spoke
from cfe_hpc.checkpoints.manifest import Manifest, ShardIndex, index_name
from cfe_hpc.checkpoints.rotation import Retention, rotate
from cfe_hpc.checkpoints.staging import Arena, Staged
from cfe_hpc.runfolder import utc_now

__all__ = ["HELD_SIGNALS", "MESSAGE_BYTES", "main", "serve"]

HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler or a terminal sends to every process of a job."""

MESSAGE_BYTES = 1 << 16
"""No request or answer is longer; what is (indexes, plans) goes through the arena."""

Act = Callable[[Mapping[str, Any]], dict[str, Any]]

_PR_SET_PDEATHSIG = 1
_NICE = 5
_REASON_CHARS = 2000


def main(socket_fd: int, arena_fd: int, parent: int) -> None:
    """Answer requests until the rank closes its end. Replaces nothing in this process but signals and priority."""
    writer = _Writer(Arena(arena_fd))
    acts: dict[str, Act] = {
        "listen": writer.listen,
        "join": writer.join,
        "attach": writer.attach,
        "write": writer.write,
        "give_up": writer.give_up,
    }
    serve(socket_fd, parent, acts, nice=_NICE, afterwards=writer.tidy)


def serve(
    socket_fd: int, parent: int, acts: Mapping[str, Act], *, nice: int, afterwards: Callable[[], None] | None = None
) -> None:
    """Answer a rank's requests, one at a time, by the act that each names, until the rank closes its end.

    Args:
        parent: the rank's process id: this process dies with it.
        afterwards: called after each answer, for what nobody waits for.
    """
    _die_with(parent)
    for number in HELD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Waking up in time keeps the disk busy and takes little; the kernel derives the I/O priority from this, too.
    with contextlib.suppress(OSError):
        os.nice(nice)
    with socket.socket(fileno=socket_fd) as rank, contextlib.suppress(ConnectionError):
        while content := rank.recv(MESSAGE_BYTES):
            request = json.loads(content)
            rank.send(json.dumps(_answer(acts[request["do"]], request)).encode())
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
    """What a writer keeps between requests. `hub` is rank 0's, `spoke` another's; a rank that is alone has neither."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._hub: Hub | None = None
        self._spoke: Spoke | None = None
        self._to_rotate: Callable[[], None] | None = None

    def listen(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Be there for the other writers, who know `secret`."""
        if self._hub is None:
            self._hub = Hub(bytes.fromhex(request["secret"]))
        return {"port": self._hub.port}

    def join(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Connect to rank 0's writer, anew if need be."""
        if self._spoke is not None:
            self._spoke.close()
        self._spoke = Spoke((request["host"], request["port"]), bytes.fromhex(request["secret"]), request["rank"])
        return {"joined": True}

    def attach(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have the arena's pages mapped before the first save asks for them."""
        self._arena.view(request["size_bytes"])
        return {"attached": True}

    def write(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write this rank's shard: a data file, its unwritten index and (rank 0) a plan lie in the arena, in turn.

        Rank 0's answer comes when the checkpoint is committed, the others' when they are done.
        """
        data_bytes, index_bytes = request["data_bytes"], request["index_bytes"]
        content = self._arena.view(data_bytes + index_bytes + request["plan_bytes"])
        rank, draft = request["rank"], Path(request["draft"])
        index = ShardIndex.unseal(bytes(content[data_bytes : data_bytes + index_bytes]), index_name(rank))
        if rank == 0:
            drafts.claim(draft, request["needed_bytes"])
        else:
            draft.parent.mkdir(exist_ok=True)  # whichever rank comes first; and see `claim`
            draft.mkdir(exist_ok=True)
        source = Staged(content[:data_bytes])
        if rank == 0:
            facts = drafts.write_shard(draft, index, source).decode()
            return self._commit(draft, index, facts, json.loads(bytes(content[data_bytes + index_bytes :])))
        try:
            facts = drafts.write_shard(draft, index, source).decode()
        except Exception as error:
            self.give_up({"token": index.identity.token, "why": reason(error), "kind": kind_of(error)})
            raise
        self._say(index.identity.token, facts=facts)
        return {"written": True}

    def give_up(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Tell rank 0's writer that this rank has no shard of a save, and `why`: a `kind_of` error."""
        self._say(request["token"], failed=request["why"][:_REASON_CHARS], kind=request["kind"])
        return {"told": True}

    def _say(self, token: str, **what: str) -> None:
        if self._spoke is not None:
            with contextlib.suppress(OSError):  # rank 0's writer has ended, as its rank will notice
                self._spoke.say(token, **what)

    def _commit(self, draft: Path, index: ShardIndex, mine: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Wait for the other shards, and make the draft count. `plan` is what background's `_plan` returns."""
        identity, root = index.identity, draft.parent
        facts = [mine.encode()] if self._hub is None else self._hub.gather(identity.token, mine, identity.world_size)
        manifest = Manifest(
            identity=identity,
            time=utc_now(),
            layout=plan["layout"],
            metrics={name: float(value) for name, value in plan["metrics"].items()},
            files=drafts.files(facts),
        )
        drafts.commit(root, draft, manifest)
        self._to_rotate = lambda: _rotate(root, plan["policy"], plan["protect"])
        return {"durable_s": time.monotonic(), "size_bytes": manifest.size_bytes}

    def tidy(self) -> None:
        """Rotate older checkpoints away after a commit."""
        if self._to_rotate is not None:
            self._to_rotate()
            self._to_rotate = None


def _rotate(root: Path, policy: Mapping[str, Any], protect: list[int]) -> None:
    try:
        rotate(root, Retention(**policy), protect=protect)
    except OSError as error:
        print(f"cfe_hpc: older checkpoints were not deleted: {reason(error)}", file=sys.stderr)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
