"""How a sweep has ended: whoever writes the last task's result writes the sweep's, for nobody else is there to."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cfe_hpc.config.tasks import Tasks
from cfe_hpc.errors import ConfigError
from cfe_hpc.runfolder import RunFolder

__all__ = ["settle"]

_ORDER = ("HELD", "FAILED", "CANCELLED", "COMPLETED")
"""A sweep has ended as the first of these that any of its tasks has."""


def settle(sweep: RunFolder, *, last: int) -> bool:
    """Write a sweep's result.json if each of its tasks has one; whether it was written.

    Args:
        last: number of the task that has just ended. It is looked at last: as a rule the one after it has not, and
            nothing more need be asked of the disk.

    Raises:
        OSError: it cannot be written.
    """
    try:
        tasks = Tasks.read(sweep.sweep_json).tasks
    except ConfigError:  # it is not the sweep that submit made: nobody can tell when it has ended
        return False
    cancelled = sweep.promised("cancel") is not None
    results = []
    for offset in range(tasks):
        task = sweep.task((last + 1 + offset) % tasks)
        result = task.result()
        if result is None and not (cancelled and task.is_cancelled and not task.run_toml.exists()):
            return False
        results.append(result or {"state": "CANCELLED", "attempts": 0})
    states = Counter(str(result.get("state")) for result in results)
    sweep.write_result(_result(states, results))
    return True


def _result(states: Counter[str], results: list[dict[str, Any]]) -> dict[str, Any]:
    number = {state: states[state] for state in _ORDER if states[state]}
    return {
        "state": next(iter(number), "FAILED"),
        "reason": "tasks: " + ", ".join(f"{count} {name}" for name, count in number.items()),
        "final_step": None,
        "attempts": sum(int(result.get("attempts") or 0) for result in results),
        "lost_steps": sum(int(result.get("lost_steps") or 0) for result in results),
        "goodput": None,
        "wall_seconds": None,
        "weights_sha256": None,
        "metrics": {},
        "tasks": number,
    }
