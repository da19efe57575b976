"""How a sweep has ended, from the results of its tasks: nobody is there at its end to write it down."""

from __future__ import annotations

from typing import Any

from cfe_hpc.config.tasks import Tasks
from cfe_hpc.runfolder import RunFolder

__all__ = ["result_of"]


def result_of(folder: RunFolder) -> dict[str, Any] | None:
    """`folder.result()` of a run. Of a sweep: None until every task has a result; then COMPLETED when all have
    completed, else the state of the first that has not.

    Raises:
        ConfigError: sweep.json cannot be read.
    """
    own = folder.result()
    if own is not None or not folder.is_sweep:
        return own
    ended = None
    cancelled = folder.promised("cancel") is not None
    for number in range(Tasks.read(folder.sweep_json).tasks):
        result = folder.task(number).result()
        if result is None and cancelled and not folder.task(number).run_toml.exists():
            result = {"state": "CANCELLED"}
        if result is None:
            return None
        if ended is None and result.get("state") != "COMPLETED":
            ended = {"state": str(result.get("state")), "reason": f"task {number}: {result.get('reason')}"}
    return ended or {"state": "COMPLETED"}
