"""Asking a run for a checkpoint now, without stopping it."""

from __future__ import annotations

import getpass

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import UsageError
from cfe_hpc.launch.jobs import latest_attempt
from cfe_hpc.ranks.jobrecords import SAVE, record
from cfe_hpc.runfolder import RunFolder

__all__ = ["request_save"]


def request_save(folder: RunFolder) -> str:
    """Ask the running attempt to save at one of its next steps, and to train on; a sentence of what was asked.

    Raises:
        UsageError: nothing there trains and saves.
    """
    if folder.result() is not None or folder.promised("held") is not None:
        raise UsageError(f"{folder.run_id}: has ended, or is held; there is nothing to save")
    attempt = latest_attempt(folder)
    if attempt is None or folder.promised(f"requeued-{attempt}") is not None:
        raise UsageError(f"{folder.run_id}: is not training now; it saves when it does")
    if RunSpec.read(folder.run_toml).job.command is not None and not _counts_steps(folder, attempt):
        raise UsageError(f"{folder.run_id}: runs a program that never joined; only the program itself could save")
    record(folder, SAVE, attempt=attempt, user=getpass.getuser())
    return f"{folder.run_id}: attempt {attempt} saves at its next step, and trains on"


def _counts_steps(folder: RunFolder, attempt: int) -> bool:
    return any(
        event.get("attempt") == attempt and "total_steps" in (event.get("detail") or {})
        for event in folder.events()
        if event.get("event") == "started"
    )
