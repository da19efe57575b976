"""Writing a rank's shard to its node and to a partner node: what a writer does of a save that goes to nodes first.

    each writer: its shard, here and there          rank 0's: hears all, makes the manifest, tells it
    one of each node: the manifest                  rank 0's: hears that it lies on every node

Then the save is complete on the nodes, and the memory it was staged in may be used again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import drafts
from cfe_hpc.checkpoints.agree import kind_of, reason
from cfe_hpc.checkpoints.beside.company import Company
from cfe_hpc.checkpoints.beside.pulse import Moving
from cfe_hpc.checkpoints.io.staging import Arena, Staged
from cfe_hpc.checkpoints.manifest import MANIFEST, Manifest, ShardIndex, index_name
from cfe_hpc.checkpoints.tiers import nodelocal
from cfe_hpc.checkpoints.tiers.partner import Receiver, Sending
from cfe_hpc.files import write_atomic
from cfe_hpc.runfolder import utc_now

__all__ = ["NodeWriter", "described", "manifest_of", "staged"]


def staged(arena: Arena, request: Mapping[str, Any], beat: Callable[[], None]) -> Staged:
    """The data file that lies first in an arena, or is still being copied there. `beat` is called when the disk is
    ready for more of it."""
    return Moving(arena, request["data_bytes"], request["serial"], beat)


def described(arena: Arena, request: Mapping[str, Any]) -> tuple[ShardIndex, dict[str, Any]]:
    """What lies behind the data file in an arena, in turn: its unwritten index and, rank 0's, a plan."""
    data_bytes, index_bytes = request["data_bytes"], request["index_bytes"]
    content = arena.view(data_bytes + index_bytes + request["plan_bytes"])
    index = ShardIndex.unseal(bytes(content[data_bytes : data_bytes + index_bytes]), index_name(request["rank"]))
    return index, json.loads(bytes(content[data_bytes + index_bytes :]) or b"{}")


def manifest_of(index: ShardIndex, plan: Mapping[str, Any], facts: list[bytes]) -> Manifest:
    """The manifest of a save: `plan` is what background's `_plan` returns, `facts` what each writer says, by rank."""
    return Manifest(
        identity=index.identity,
        time=utc_now(),
        layout=plan["layout"],
        metrics={name: float(value) for name, value in plan["metrics"].items()},
        files=drafts.files(facts),
    )


class NodeWriter:
    """The requests of a rank that have to do with its node."""

    def __init__(self, arena: Arena, others: Company) -> None:
        self._arena, self._others = arena, others
        self._receiver: Receiver | None = None
        self._secret = b""

    def receive(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Take shards of ranks on another node."""
        if self._receiver is None:
            self._secret = bytes.fromhex(request["secret"])
            self._receiver = Receiver(Path(request["home"]), self._secret)
        return {"port": self._receiver.port}

    def write(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write this rank's shard of a save; the answer comes when the save is complete on the nodes.

        It says why the partner has no copy: `without_partner`.
        """
        data = staged(self._arena, request, self._others.beat)
        index, plan = described(self._arena, request)
        token, size, rank = index.identity.token, index.identity.world_size, index.rank
        stage = f"{token} written"
        try:
            facts, without_partner = self._write_shard(request, index, data)
            if rank == 0:
                content = manifest_of(index, plan, self._others.gather(stage, facts, size)).seal()
                self._others.tell(stage, manifest=content.decode())
            else:
                self._others.say(stage, facts=facts)
                content = self._others.hear(stage)["manifest"].encode()
            stage = f"{token} placed"
            if request["leads"]:
                write_atomic(Path(request["home"]) / nodelocal.copy_name(index.identity) / MANIFEST, content)
            if rank == 0:
                self._others.gather(stage, "", size)
            else:
                self._others.say(stage, facts="")
        except Exception as error:
            self._others.give_up({"token": stage, "why": reason(error), "kind": kind_of(error)})
            raise
        return {"local_s": time.monotonic(), "without_partner": without_partner}

    def _write_shard(self, request: Mapping[str, Any], index: ShardIndex, data: Staged) -> tuple[str, str | None]:
        """What the manifest says of the shard; why the partner has no copy, None when it has (or there is none)."""
        home, name = Path(request["home"]), nodelocal.copy_name(index.identity)
        nodelocal.check_room(home, name, request["node_bytes"], request["limit_bytes"])
        (home / name).mkdir(mode=0o700, exist_ok=True)
        sending = None
        if request["partner"] is not None:
            sending = Sending(request["partner"], self._secret, name, index.rank, data)
        try:
            facts = drafts.write_shard(home / name, index, data).decode()
        except BaseException:
            if sending is not None:
                sending.abandon()
            raise
        if sending is None:
            return facts, None
        return facts, sending.finish((home / name / index_name(index.rank)).read_bytes())
