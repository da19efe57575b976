"""Going back to the last good checkpoint after a loss or a gradient that is not finite, inside the attempt."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol, runtime_checkable

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import NonFinite
from cfe_hpc.ranks.finite import Finite
from cfe_hpc.ranks.journal import Journal
from cfe_hpc.ranks.keeper import Keeper
from cfe_hpc.recovery.budgets import decide
from cfe_hpc.recovery.effects import Adjustments, adjustments
from cfe_hpc.runfolder import RunFolder

__all__ = ["RollBacks", "SkipsWindows", "Spent"]

logger = logging.getLogger(__name__)


@runtime_checkable
class SkipsWindows(Protocol):
    """What a tracked object may have for data to be skipped; data.loader.BatchLoader is one.

    Samples are counted over all ranks, and do not depend on how many there are. What is skipped is in its state_dict.
    """

    def window_ahead(self, batches: int) -> tuple[int, int]:
        """Global samples [start, stop) of the global batch that comes after `batches` others."""

    def skip_window(self, start: int, stop: int) -> None:
        """Leave global samples [start, stop) out from now on; doing so again changes nothing."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Spent(NonFinite):
    """No roll-back is left in the budget: the run is to be held."""


class RollBacks:
    """The roll-backs of one attempt, and what those of earlier ones left to be done otherwise.

    Making one is collective, as every method is.

    Attributes:
        adjusted: what the run's events ask of this attempt, its own roll-backs so far included.
    """

    def __init__(self, folder: RunFolder, spec: RunSpec, group: Group, journal: Journal, keeper: Keeper) -> None:
        self._folder, self._recovery, self._group = folder, spec.job.recovery, group
        self._journal, self._keeper = journal, keeper
        self._windows: SkipsWindows | None = None
        self._began = 0
        self._fresh: dict[str, Any] | None = None
        said = b"" if group.rank else json.dumps(asdict(adjustments(folder.events()))).encode()
        found = json.loads(group.broadcast(said))
        self.adjusted = Adjustments(**{**found, "skipped": tuple(tuple(each) for each in found["skipped"])})

    def begin(self, done: int, objects: Mapping[str, Any]) -> None:
        """Leave out what earlier roll-backs did, for the checkpoint may be older than they are.

        Args:
            done: steps done.
            objects: what is tracked, restored.
        """
        self._began = done
        found = [thing for thing in objects.values() if isinstance(thing, SkipsWindows)]
        if len(found) != 1:
            return  # whose samples are meant is not known
        self._windows = found[0]
        self._skip_again()
        if self._keeper.saved_step is None:
            self._fresh = copy.deepcopy(self._windows.state_dict())

    def go_back(self, finite: Finite, *, bad_step: int, done: int) -> int:
        """Restore everything tracked from before the bad step, and skip the data it came of.

        The same bad step again means that it began before it was seen: a checkpoint right before it is taken for bad
        itself, an older one used if there is one, and the data of the step before skipped as well.

        Args:
            finite: this rank's; what it found may be nothing, where another rank has found it.
            bad_step: steps done with the first bad one.
            done: steps done now.

        Returns:
            Steps done at the checkpoint.

        Raises:
            Spent: no roll-back is left in the budget.
            NonFinite: there is no checkpoint yet: the next attempt starts over, and skips the data, too.
            CorruptCheckpoint: there are checkpoints, and none verifies.
        """
        began_s = time.monotonic()
        what = next(filter(None, (each.decode() for each in self._group.all_gather(finite.what.encode()))))
        again, spent = self._look_back(bad_step)
        if spent:
            raise Spent(f"{what} at step {bad_step}: {spent}")
        step = self._keeper.go_back(bad_step - again)
        if step is None and again:
            step = self._keeper.go_back(bad_step)
        starts_over = step is None
        if step is None:
            step = self._to_start()
        self._skip_again()
        samples = self._skip(bad_step - 1 - step, again)
        scale = self.adjusted.lr_scale * (self._recovery.nan_lr_factor or 1.0)
        skipped = () if samples is None else (samples,)
        self.adjusted = replace(self.adjusted, lr_scale=scale, skipped=(*self.adjusted.skipped, *skipped))
        self._journal.event(
            "rolled_back",
            step=step,
            reason="nan",
            seconds=round(time.monotonic() - began_s, 3),
            detail={"bad_step": bad_step, "value": what, "samples": samples, "lr_scale": scale, "undone": done - step},
        )
        if samples is None:
            why = "no tracked object, or more than one, has window_ahead and skip_window"
            self._journal.event("degraded", step=step, reason="window_not_skipped", detail=why)
        if starts_over:
            raise NonFinite(f"{what} at step {bad_step}, before the first checkpoint: the run starts over")
        if self._group.rank == 0:
            logger.warning("%s at step %d: back to step %d, without samples %s", what, bad_step, step, samples)
        finite.forget()
        return step

    def _look_back(self, bad_step: int) -> tuple[int, str]:
        """How often this step was bad before, and why no roll-back is left; empty when one is."""
        said = b""
        if self._group.rank == 0:
            events = list(self._folder.events())
            past = [event["detail"]["bad_step"] for event in events if event["event"] == "rolled_back"]
            decision = decide(self._recovery, events, cause="nan")
            spent = "" if decision.action == "requeue" else decision.why
            said = json.dumps([past.count(bad_step), spent]).encode()
        again, spent = json.loads(self._group.broadcast(said))
        return again, spent

    def _to_start(self) -> int:
        """Where this attempt began; of what is tracked, data alone go back there, if it was without a checkpoint."""
        if self._windows is not None and self._fresh is not None:
            self._windows.load_state_dict(self._fresh)
        else:
            self._windows = None
        return self._began

    def _skip_again(self) -> None:
        """What was restored may be older than what was skipped since."""
        if self._windows is not None:
            for start, stop in self.adjusted.skipped:
                self._windows.skip_window(start, stop)

    def _skip(self, batches: int, again: int) -> tuple[int, int] | None:
        """Skip the data that come after so many batches, and those of `again` batches before."""
        if self._windows is None:
            return None
        first, _ = self._windows.window_ahead(max(0, batches - again))
        _, stop = self._windows.window_ahead(batches)
        self._windows.skip_window(first, stop)
        return first, stop
