"""result.json: how a run ended; the same keys, whether a rank, the batch script, a supervisor or a verb writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from cfe_hpc.recovery import ledger
from cfe_hpc.runfolder import RunFolder

__all__ = ["write_result"]


def write_result(
    folder: RunFolder,
    state: Literal["COMPLETED", "FAILED", "CANCELLED", "HELD"],
    *,
    attempts: int,
    reason: str | None = None,
    final_step: int | None = None,
    weights_sha256: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write result.json from what is given and from the run's events and heartbeats. One process of a run calls it.

    A run that never spoke of steps (a plain `command`) has none to report: what would need them is null, not invented.

    Args:
        attempts: allocations the run has had.
        reason: why it ended so, where that is worth a sentence.
        final_step: steps done; as the events tell when None.
        weights_sha256: see ranks.weights; None when the run did not complete, or holds no weights.
    """
    books = ledger.summarise(folder)
    counted = final_step is not None or books.last_step > 0 or books.total_steps is not None
    folder.write_result(
        {
            "state": state,
            **({} if reason is None else {"reason": reason}),
            "final_step": (books.last_step if final_step is None else final_step) if counted else None,
            "attempts": attempts,
            "lost_steps": books.lost_steps if counted else None,
            "goodput": books.goodput,
            "wall_seconds": books.wall_seconds,
            "weights_sha256": weights_sha256,
            "metrics": dict(metrics or {}),
        }
    )
