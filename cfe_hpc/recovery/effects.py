"""What the next attempt does otherwise, and how it learns of it: from events, which are all that attempts share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cfe_hpc.recovery.exclusions import Exclusion, exclude, runs_root
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import epoch_s

__all__ = ["Adjustments", "Effect", "adjustments", "carry_out"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One thing that the next attempt does otherwise: a `degraded` event with this reason and detail."""

    reason: str
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustments:
    """What earlier attempts, and roll-backs of this one, have taught a training.

    Attributes:
        micro_batch_divisor: a power of two; the micro-batch that the job asks for is divided by it.
        lr_scale: factor of the learning rate.
        skipped: windows of global samples, each from the first up to, not including, the last; they are left out.
    """

    micro_batch_divisor: int = 1
    lr_scale: float = 1.0
    skipped: tuple[tuple[int, int], ...] = ()


def carry_out(folder: RunFolder, effects: Iterable[Effect], *, attempt: int) -> None:
    """Write each effect down, before another attempt is asked for. One process of the run calls it."""
    for effect in effects:
        if effect.reason == "node_excluded":
            _exclude(folder, effect.detail, attempt)
        folder.note_event("degraded", attempt=attempt, reason=effect.reason, detail=dict(effect.detail))


def _exclude(folder: RunFolder, about: Mapping[str, Any], attempt: int) -> None:
    """Other runs learn of it, too; where that cannot be written the run goes on."""
    node, until_s = str(about["node"]), epoch_s(about["until"])
    assert until_s is not None
    cause, why = str(about["cause"]), str(about["why"])
    exclusion = Exclusion(node=node, until_s=until_s, cause=cause, why=why, run_id=folder.run_id, attempt=attempt)
    try:
        exclude(runs_root(folder), exclusion)
    except (OSError, ValueError) as error:
        logger.warning("%s failed, but cannot be noted as a node to avoid: %s", node, error)


def adjustments(events: Iterable[dict[str, Any]]) -> Adjustments:
    """What a run's events ask of whoever trains on.

    `degraded` with reason micro_batch_halved divides by the `divisor` of its detail once more; `rolled_back` has in
    its detail the `lr_scale` that holds from then on and the `samples` [first, end] that are left out. A hold takes
    back none of it.
    """
    divisor, lr_scale = 1, 1.0
    skipped: list[tuple[int, int]] = []
    for event in events:
        found = event.get("detail")
        detail = found if isinstance(found, dict) else {}
        if event.get("event") == "degraded" and event.get("reason") == "micro_batch_halved":
            by = detail.get("divisor")
            divisor *= by if isinstance(by, int) and by > 1 else 1
        elif event.get("event") == "rolled_back":
            scale, window = detail.get("lr_scale"), detail.get("samples")
            lr_scale = float(scale) if isinstance(scale, (int, float)) else lr_scale
            if isinstance(window, list) and len(window) == 2 and all(isinstance(sample, int) for sample in window):
                skipped.append((window[0], window[1]))
    return Adjustments(micro_batch_divisor=divisor, lr_scale=lr_scale, skipped=tuple(skipped))
