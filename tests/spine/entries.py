"""Entries for whole-run tests. The shipped training, slowed down so that a test can hit the step it wants to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cfe_hpc.train.main import run as train


def paced(run: Any) -> None:
    """`cfe_hpc.train.main:run` with a pause in each step, as long as the run folder's file `pace` says.

    The pause changes nothing that is computed: an undisturbed run without it must end with the same weights.
    """
    pace: Path = run.folder.path / "pace"
    steps = run.steps

    def slowly(total: int) -> Any:
        for step in steps(total):
            yield step
            try:
                time.sleep(float(pace.read_text()))
            except (FileNotFoundError, ValueError):
                continue

    run.steps = slowly
    train(run)
