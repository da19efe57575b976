"""The table of `status SWEEP`: how many tasks are in which state, a row for each that is worth one, and the best."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from cfe_hpc.cli import common

if TYPE_CHECKING:
    from cfe_hpc.reports.sweep import TaskStatus
    from cfe_hpc.runfolder import RunFolder

__all__ = ["read", "show"]

_ROWS = 100
"""Rows of a table; a larger sweep shows those first that something is wrong with, then those that run."""

_WORTH = ("FAILED", "HELD", "RUNNING", "CANCELLED", "PENDING", "COMPLETED")


def show(sweep: RunFolder, args: argparse.Namespace) -> int:
    """Print the table, or the JSON list of its tasks; 3 when the scheduler gave no answer.

    Raises:
        UsageError: --best is not NAME:min or NAME:max.
    """
    from cfe_hpc.reports.sweep import best_of, metric_of

    metric = metric_of(sweep, _asked(args.best))
    tasks, failures = read(sweep, metric=None if metric is None else metric[0])
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    best = None if metric is None else best_of(tasks, metric[1])
    if args.json:
        common.print_json([_document(task, best) for task in tasks])
    else:
        sys.stdout.write(_table(sweep, tasks, best, metric, all_rows=args.all))
    return 3 if failures else 0


def read(sweep: RunFolder, *, metric: str | None = None, brief: bool = False) -> tuple[list[TaskStatus], list[str]]:
    """(the sweep's tasks, as `read_sweep` has them; what a scheduler that gave no answer said). It is asked once."""
    from cfe_hpc.cli.status import ask
    from cfe_hpc.reports.sweep import live_jobs, read_sweep

    words, failures = ask([(sweep, job) for job in live_jobs(sweep)])
    return read_sweep(sweep, words, metric=metric, brief=brief), failures


def _asked(best: str | None) -> str | None:
    from cfe_hpc.errors import UsageError

    if best is not None and not best.endswith((":min", ":max")):
        raise UsageError(f"--best: not a metric and its better end ({best}); write for example val_loss:min")
    return best


def _document(task: TaskStatus, best: TaskStatus | None) -> dict[str, Any]:
    status = {name: getattr(task.status, name) for name in task.status.__slots__}
    return {**status, "task": task.task, "values": task.values, "metric": task.metric, "best": task is best}


def _table(
    sweep: RunFolder,
    tasks: Sequence[TaskStatus],
    best: TaskStatus | None,
    metric: tuple[str, Literal["min", "max"]] | None,
    *,
    all_rows: bool,
) -> str:
    from cfe_hpc.reports.sweep import counts

    number = ", ".join(f"{count} {state}" for state, count in counts(tasks).items())
    shown = sorted(tasks, key=lambda task: _WORTH.index(task.status.state))
    shown = sorted(shown if all_rows else shown[:_ROWS], key=lambda task: task.task)
    keys = list(tasks[0].values)
    headings = ["TASK", "STATE", "JOB", "ATTEMPT", "STEP", *([metric[0]] if metric else []), *keys, "REASON"]
    rows = [headings, *(_row(task, keys, with_metric=metric is not None) for task in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{sweep.run_id}: {len(tasks)} tasks: {number}", ""]
    lines += ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(shown) < len(tasks):
        lines.append(f"({len(tasks) - len(shown)} more: `cfe-hpc status {sweep.run_id} --all`)")
    if best is not None and metric is not None:
        values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in best.values.items())
        lines += ["", f"best {metric[0]}: {best.metric:g}, task {best.task}: {values}"]
    return "\n".join(lines) + "\n"


def _row(task: TaskStatus, keys: Sequence[str], *, with_metric: bool) -> list[str]:
    status = task.status
    total = "" if status.total_steps is None else f"/{status.total_steps}"
    metric = ["-" if task.metric is None else f"{task.metric:.6g}"] if with_metric else []
    return [
        str(task.task),
        status.state,
        status.job_id or "-",
        "-" if status.attempt is None else str(status.attempt),
        "-" if status.step is None else f"{status.step}{total}",
        *metric,
        *(str(task.values[key]) for key in keys),
        status.reason.splitlines()[0][:80] if status.reason else "",
    ]
