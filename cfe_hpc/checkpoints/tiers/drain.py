"""The way of checkpoints from the nodes to the shared filesystem, as one rank takes part in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.agree import first_rank
from cfe_hpc.checkpoints.beside.crew import Crew
from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.manifest import Identity
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.store import CheckpointInfo
from cfe_hpc.checkpoints.tiers.places import NodeTier
from cfe_hpc.errors import CheckpointError

__all__ = ["Drain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Going:
    """The checkpoint that is on its way."""

    identity: Identity
    draft: Path
    began_s: float


class Drain:
    """One checkpoint at a time, complete on the nodes, goes to the shared filesystem."""

    def __init__(
        self, root: Path, tier: NodeTier, policy: Retention, protect: Sequence[int], attempt: int, crew: Crew
    ) -> None:
        """
        Args:
            root: the checkpoints folder.
            policy: what stays there.
            protect: steps that stay there in any case.
            crew: the drainers.
        """
        self._root, self._tier, self._policy, self._protect = root, tier, policy, protect
        self._attempt, self._crew = attempt, crew
        self._going: _Going | None = None

    @property
    def step(self) -> int | None:
        """The step on its way, the same on every rank; None without one."""
        return None if self._going is None else self._going.identity.step

    def start(self) -> None:
        """Start the drainers: it takes them a moment to be there. Collective.

        Raises:
            StagingError: a rank could not start its own; the same on every rank.
        """
        self._crew.start()

    @property
    def is_met(self) -> bool:
        """Whether this rank's drainer runs, and is connected."""
        return self._crew.is_met

    def meet(self) -> None:
        """Have drainers that know of each other. Collective; raises as `start`."""
        self._crew.meet(self._crew.start())

    def begin(self, group: Group, identity: Identity, began_s: float) -> None:
        """Send a checkpoint on its way. Collective; while none is.

        Args:
            began_s: time.monotonic() when its save began.

        Raises:
            StagingError: there are no drainers; the same on every rank.
        """
        assert self._going is None
        self.meet()
        draft = self._root / folders.draft_name(identity.step, identity.attempt, identity.token)
        self._going = _Going(identity=identity, draft=draft, began_s=began_s)
        self._crew.worker.ask(
            {
                "do": "drain",
                "folder": str(self._tier.folder(identity)),
                "draft": str(draft),
                "rank": group.rank,
                "token": identity.token,
                "policy": asdict(self._policy),
                "protect": list(self._protect),
            }
        )

    def busy(self) -> bool:
        """Whether this rank's drainer has something to do still; to be agreed upon, then passed to `advance`."""
        return self._going is not None and self._crew.worker.busy()

    def advance(self, group: Group, busy: bool) -> CheckpointInfo | None:
        """Take note of what is on its way, if it has come to its end. Collective.

        Returns:
            The checkpoint, once it is durable and committed; its `seconds` are those since its save began.

        Raises:
            CheckpointError: it did not arrive, the same on every rank; the nodes' copies stay.
        """
        going = self._going
        if going is None or busy:
            return None
        self._going = None
        identity = going.identity
        try:
            ended = first_rank(group, lambda: self._crew.committed(identity, going.draft, going.began_s))
        except CheckpointError:
            self._remove(group, going)
            raise
        seconds, size_bytes = json.loads(ended)
        self.keep(durable=identity)
        path = self._root / folders.step_name(identity.step)
        return CheckpointInfo(path=path, step=identity.step, size_bytes=size_bytes, seconds=seconds)

    def keep(self, *, durable: Identity | None = None, drop: Identity | None = None, sweep: bool = False) -> None:
        """Have the drainer of each node's first rank delete what the node needs no more. Not collective.

        Args:
            durable: a save that the shared filesystem has now.
            drop: a save that has failed.
            sweep: look after what other runs have left, too.
        """
        tier = self._tier
        if tier.local_rank != 0 or self._crew.worker.pid is None:
            return
        self._crew.worker.ask(
            {
                "do": "keep",
                "home": str(tier.home),
                "host": tier.hosts[tier.node],
                "durable": None if durable is None else str(tier.folder(durable)),
                "drop": None if drop is None else str(tier.folder(drop)),
                "sweep": sweep,
                "keep_last": tier.keep_last,
                "attempt": self._attempt,
                "record": str(self._root) if tier.node == 0 else None,
            }
        )

    def wait(self) -> None:
        """Return when this rank's drainer has nothing to do."""
        if self._going is not None:
            self._crew.worker.wait()

    def abandon(self, group: Group) -> None:
        """Leave what is on its way where it is: on the nodes. Collective; drainers are killed, and started anew."""
        going, self._going = self._going, None
        if going is not None:
            self._crew.worker.kill()
            group.barrier()
            self._remove(group, going)

    def _remove(self, group: Group, going: _Going) -> None:
        if group.rank == 0:
            shutil.rmtree(going.draft, ignore_errors=True)

    def close(self) -> None:
        """End this rank's drainer, whatever it does."""
        self._going = None
        self._crew.worker.kill()
        self._crew.worker.arena.close()
