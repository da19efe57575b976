"""What ranks agree on at a step's boundary, in one round: whether to stop, to save, or to go back."""

from __future__ import annotations

from typing import NamedTuple

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.ranks import timer
from cfe_hpc.ranks.finite import Finite
from cfe_hpc.ranks.journal import Journal
from cfe_hpc.ranks.keeper import Keeper
from cfe_hpc.ranks.signals import STOP_SIGNALS, StopFlag

__all__ = ["Agreed", "Agreement"]

_FOUND = 1 << len(STOP_SIGNALS)
"""Among the stop bits: the scheduler has told this attempt to stop before it could hear signals."""

_AFTER_ANY_STEP = 1 << 40
"""The first bad step is agreed on as this less the step: what ranks agree on is a maximum."""


class Agreed(NamedTuple):
    """The same on every rank.

    Attributes:
        stop_bits: of signals and the rest; 0 when nobody was told to stop.
        save_due: by time. Clocks differ: rank 0's decides.
        bad_step: steps done with the first that gave a value that is not finite; None when nobody has seen one.
    """

    stop_bits: int
    save_due: bool
    bad_step: int | None


class Agreement:
    """One rank's part in it."""

    def __init__(
        self, group: Group, flag: StopFlag, finite: Finite, journal: Journal, keeper: Keeper, *, stop_at_once: bool
    ) -> None:
        self._group, self._flag, self._finite = group, flag, finite
        self._journal, self._keeper, self._stop_at_once = journal, keeper, stop_at_once

    def reach(self, *, time_due: bool = False, look: bool = False) -> Agreed:
        """Agree. Collective. A save in flight goes on here: whether any rank still writes costs no round of its own.

        Args:
            time_due: whether a save is due by this rank's clock.
            look: wait for the device, and look at what was logged; the same on every rank.
        """
        bits = self._flag.bits | (_FOUND if self._stop_at_once else 0)
        bits |= timer.TIMER_BIT if self._journal.out_of_time() else 0
        mine = [bits, int(time_due and self._group.rank == 0), self._bad() if look else 0, *self._keeper.busy()]
        agreed = self._group.all_max(mine)
        self._keeper.advance(agreed[3:])
        return Agreed(agreed[0], bool(agreed[1]), _step(agreed[2]))

    def first_bad(self) -> int | None:
        """`bad_step` alone, with a look at what was logged. Collective."""
        return _step(self._group.all_max([self._bad()])[0])

    def heed(self) -> None:
        """Take note that a stop is being acted on: only a new one counts from now on. Not collective."""
        self._flag.clear()
        self._stop_at_once = False

    def _bad(self) -> int:
        bad_step = self._finite.first_bad()
        return 0 if bad_step is None else _AFTER_ANY_STEP - bad_step


def _step(bad: int) -> int | None:
    return _AFTER_ANY_STEP - bad if bad else None
