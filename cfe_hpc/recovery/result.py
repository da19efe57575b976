"""result.json: how a run ended; the same keys, whether a rank, the batch script, a supervisor or a verb writes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from cfe_hpc.recovery import lead, ledger
from cfe_hpc.recovery.sweep_result import settle
from cfe_hpc.runfolder import RunFolder

__all__ = ["add_metrics", "close_books", "write_result"]

logger = logging.getLogger(__name__)


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

    Where it cannot be written, for want of a disk that takes anything, that is a warning: the end of a run goes on.
    A run that never spoke of steps (a plain `command`) has none to report: what would need them is null, not invented.

    Args:
        attempts: allocations the run has had.
        reason: why it ended so, where that is worth a sentence.
        final_step: steps done; as the events tell when None.
        weights_sha256: see ranks.weights; None when the run did not complete, or holds no weights.
    """
    books = ledger.summarise(folder, completing_s=time.time() if state == "COMPLETED" else None)
    measured = lead.measure(folder)
    counted = final_step is not None or books.last_step > 0 or books.total_steps is not None
    _write(
        folder,
        {
            "state": state,
            **({} if reason is None else {"reason": reason}),
            "final_step": (books.last_step if final_step is None else final_step) if counted else None,
            "attempts": attempts,
            "lost_steps": books.lost_steps if counted else None,
            **_times(books),
            "weights_sha256": weights_sha256,
            "metrics": dict(metrics or {}),
            "measured": None if measured is None else asdict(measured),
        },
    )


def _times(books: ledger.Summary) -> dict[str, Any]:
    return {"goodput": books.goodput, "wall_seconds": books.wall_seconds, "buckets": books.buckets}


def close_books(folder: RunFolder) -> None:
    """Bring the times of result.json, if there is one, up to the end of the last attempt: the ranks wrote them before
    they ended, and their nodes were held a little longer. The batch script's epilogue, or the supervisor, calls it when
    it has noted that end."""
    result = folder.result()
    if result is not None and result.get("state") is not None:
        _write(folder, {**result, **_times(ledger.summarise(folder))})


def add_metrics(folder: RunFolder, metrics: Mapping[str, float]) -> None:
    """Add to the metrics of result.json, as `write_result` writes them."""
    result = folder.result() or {}
    result["metrics"] = {**result.get("metrics", {}), **metrics}
    _write(folder, result)


def _write(folder: RunFolder, result: dict[str, Any]) -> None:
    try:
        folder.write_result(result)
    except OSError as error:
        logger.warning(
            "how the run ended (%s) is lost: %s: %s", result.get("state"), folder.result_path, error.strerror
        )
        return
    if folder.sweep is not None:
        try:
            settle(folder.sweep, last=folder.sweep_task or 0)
        except OSError as error:
            logger.warning("how the sweep ended is lost: %s: %s", folder.sweep.result_path, error.strerror)
