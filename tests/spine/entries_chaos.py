"""Entries for runs that are hurt from inside: they do as the files in the run folder's `chaos` say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def training(run: Any) -> None:
    """The shipped training."""
    _obey(run)
    # Here, for `bulky` needs no torch.
    from cfe_hpc.train.main import run as train

    train(run)


def bulky(run: Any) -> None:
    """`entries:bulky`."""
    _obey(run)
    from entries import bulky as count

    count(run)


def _obey(run: Any) -> None:
    """Pause each step as the file `pace` says; a file `nan.RANK` or `memory.RANK` in `chaos` counts once."""
    steps, log = run.steps, run.log

    def taken(order: str) -> bool:
        try:
            (run.folder.path / "chaos" / f"{order}.{run.rank}").unlink()
        except FileNotFoundError:
            return False
        return True

    def disturbed(total: int) -> Any:
        for step in steps(total):
            if taken("memory"):
                _take_memory()
            yield step
            _pause(run.folder.path / "pace")

    def poisoned(**values: Any) -> None:
        if "loss" in values and taken("nan"):
            values["loss"] = float("nan")
        log(**values)

    run.steps, run.log = disturbed, poisoned


def _pause(pace: Path) -> None:
    try:
        time.sleep(float(pace.read_text()))
    except (FileNotFoundError, ValueError):
        return


def _take_memory() -> None:
    """More than the job has asked for, until Slurm has seen it."""
    held = []
    for _ in range(20):
        held.append(b"x" * (128 << 20))
    time.sleep(30)
    raise RuntimeError(f"nobody minds {len(held) * 128} MiB: no memory limit is enforced here")
