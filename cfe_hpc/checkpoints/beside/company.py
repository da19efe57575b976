"""What a helper process has of those of the other ranks: a hub if it is rank 0's, a spoke otherwise, alone neither."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from cfe_hpc.checkpoints.beside.hub import Hub, Spoke
from cfe_hpc.checkpoints.beside.pulse import Pulse

__all__ = ["MOVED", "Company"]

MOVED = {"moved": True}
"""What a helper sends its rank before the answer, again and again."""

_REASON_CHARS = 2000


class Company:
    """The others. `listen`, `join` and `give_up` are requests of a rank; see writer.serve."""

    def __init__(self, rank: socket.socket) -> None:
        """`rank` is the connection to this process's own rank, which hears of it when bytes move."""
        self._rank = rank
        self._hub: Hub | None = None
        self._spoke: Spoke | None = None
        self._pulse = Pulse(self._tell_moved)

    @property
    def beat(self) -> Callable[[], None]:
        """To be called when bytes have moved."""
        return self._pulse.beat

    def _tell_moved(self) -> None:
        with contextlib.suppress(OSError):  # it has ended; or it has not listened for long, and hears the earlier ones
            self._rank.send(json.dumps(MOVED).encode(), socket.MSG_DONTWAIT)
        if self._spoke is not None:
            with contextlib.suppress(OSError):
                self._spoke.beat()

    def listen(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Be there for the others, who know `secret`."""
        if self._hub is None:
            self._hub = Hub(bytes.fromhex(request["secret"]))
        return {"port": self._hub.port}

    def join(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Connect to rank 0's, anew if need be."""
        if self._spoke is not None:
            self._spoke.close()
        self._spoke = Spoke((request["host"], request["port"]), bytes.fromhex(request["secret"]), request["rank"])
        return {"joined": True}

    def give_up(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Tell rank 0's, or as rank 0's the others, that there is no shard of a save, and `why`: a `kind_of` error."""
        failed = {"failed": request["why"][:_REASON_CHARS], "kind": request["kind"]}
        self.say(request["token"], **failed)
        if self._hub is not None:
            self._hub.tell(request["token"], **failed)
        return {"told": True}

    def say(self, token: str, **what: str) -> None:
        """Tell rank 0's `facts`, or why this rank has `failed` and the `kind` of error."""
        if self._spoke is not None:
            with contextlib.suppress(OSError):  # it has ended, as its rank will notice
                self._spoke.say(token, **what)

    def gather(self, token: str, mine: str, size: int) -> list[bytes]:
        """As rank 0's: what each says of the save of `token`, by rank. Raises CheckpointError: one has failed."""
        return [mine.encode()] if self._hub is None else self._hub.gather(token, mine, size, self.beat)

    def tell(self, token: str, **what: str) -> None:
        """As rank 0's: tell all others something of the save of `token`."""
        if self._hub is not None:
            self._hub.tell(token, **what)

    def hear(self, token: str) -> dict[str, str]:
        """As another's: what rank 0's tells of the save of `token`. Raises CheckpointError when that has failed."""
        assert self._spoke is not None
        return self._spoke.hear(token, self.beat)
