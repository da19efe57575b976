"""What ranks settle with each other before any of them copies: sizes, memory, helpers, and the save's token."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from cfe_hpc.checkpoints import drafts
from cfe_hpc.checkpoints.agree import all_ranks, reason
from cfe_hpc.checkpoints.beside.crew import Crew
from cfe_hpc.checkpoints.layout import Placement, place
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.store import Content
from cfe_hpc.checkpoints.tiers.drain import Drain
from cfe_hpc.errors import StagingError
from cfe_hpc.units import format_size

__all__ = ["Preparation", "Prepared"]

_EXTENT_BYTES = 256
_SLACK_BYTES = 1 << 20
"""Estimates of what an index takes beside its names and its state; the latter may grow by a few digits, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a save may count on.

    Attributes:
        form: of the content that it is for; see Content.
        placement: where this rank's bytes go.
        sizes: (node, bytes) of each rank, nearly.
        token: the save's, the same on every rank.
    """

    form: object
    placement: Placement
    sizes: tuple[tuple[int, int], ...]
    token: str


class Preparation:
    """The preparations of one attempt's saves, one after the other, as one rank takes part in them."""

    def __init__(self, group: Group, crew: Crew, drain: Drain | None, *, node: int, limit_bytes: int | None) -> None:
        """
        Args:
            drain: its helpers are prepared, too.
            node: this rank's, counted from 0 on.
            limit_bytes: as Background's.
        """
        self._group, self._crew, self._drain = group, crew, drain
        self._node, self._limit_bytes = node, limit_bytes
        self._last: Prepared | None = None

    def is_ready(self, form: object) -> bool:
        """Whether what ranks settled for the last save serves this rank for one of content of this form, too."""
        crews_met = self._crew.is_met and (self._drain is None or self._drain.is_met)
        return crews_met and self._last is not None and self._last.form is form

    def prepare(self, content: Content) -> Prepared:
        """Have memory and a writer for a save of `content`. Collective, but for content that is `awaited`.

        Raises:
            CheckpointError: a piece does not fit its dtype and shape; the same on every rank.
            StagingError: there is no memory, or no writer; the same on every rank.
        """
        last, self._last = self._last, None
        if content.awaited and last is not None:
            self._last = replace(last, token=_following(last.token))
        else:
            self._last = self._settle(content)
        return self._last

    def forget(self) -> None:
        """Settle everything anew the next time."""
        self._last = None

    def _settle(self, content: Content) -> Prepared:
        placements: list[Placement] = []

        def ready() -> bytes:
            placements.append(place([*content.pieces, *content.own]))
            state_bytes = len(json.dumps(content.state, allow_nan=False))
            size_bytes = placements[0].size_bytes + state_bytes
            index_bytes = sum(len(extent.name) + _EXTENT_BYTES for extent in placements[0].extents)
            self._fit(size_bytes + index_bytes + _SLACK_BYTES)
            new = self._crew.started().decode()
            return json.dumps([self._node, size_bytes, new, drafts.new_token()]).encode()

        ranks = [json.loads(found) for found in all_ranks(self._group, ready)]
        self._crew.meet([new.encode() for _, _, new, _ in ranks])
        if self._drain is not None:
            self._drain.meet()
        self._crew.worker.attach()
        sizes = tuple((node, size_bytes) for node, size_bytes, _, _ in ranks)
        return Prepared(form=content.form, placement=placements[0], sizes=sizes, token=ranks[0][3])

    def _fit(self, size_bytes: int) -> None:
        if self._limit_bytes is not None and size_bytes > self._limit_bytes:
            raise StagingError(
                f"staging takes {format_size(size_bytes)}, checkpoint.staging_memory allows "
                f"{format_size(self._limit_bytes)}"
            )
        try:
            self._crew.worker.arena.reserve(size_bytes)
        except OSError as error:
            raise StagingError(f"no memory for staging, {format_size(size_bytes)}: {reason(error)}") from error


def _following(token: str) -> str:
    """The next save's token, by which ranks need not tell it each other."""
    return hashlib.sha256(token.encode()).hexdigest()[: len(token)]
