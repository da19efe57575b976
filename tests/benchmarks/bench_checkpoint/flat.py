"""Whether a checkpoint costs the same after many steps, and beside many others."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from bench_checkpoint import files
from bench_checkpoint.ours import RUN
from bench_checkpoint.ways import Place
from cfe_hpc.checkpoints.background import Background
from cfe_hpc.checkpoints.rotation import Retention
from cfe_hpc.checkpoints.tracked import capture


def many_saves(state: Any, place: Place, folder: Path, keep: int, saves: int, steps_between: int) -> dict[str, Any]:
    """`saves` asynchronous saves, the boundaries of `steps_between` steps after each; seconds of each of them."""
    background = Background(root=folder, run_id=RUN, attempt=0, group=place.group, policy=Retention(keep_last=keep))
    background.start()
    background.reserve(capture({"state": state}, group=place.group))
    blocked, durable, boundaries = [], [], []
    try:
        for number in range(1, saves + 1):
            began = time.monotonic()
            background.begin(capture({"state": state}, group=place.group), step=number * steps_between)
            blocked.append(time.monotonic() - began)
            began = time.monotonic()
            for _ in range(steps_between):
                busy = bool(place.group.all_max([int(background.busy())])[0])
                info = background.advance(busy)
                if info is not None:
                    durable.append(info.seconds)
            boundaries.append((time.monotonic() - began) / steps_between)
            info = background.finish()
            if info is not None:
                durable.append(info.seconds)
    finally:
        background.close()
    return {
        "blocked": blocked,
        "durable": durable,
        "boundary": boundaries,
        "resident_bytes": files.resident_bytes(),
        "descriptors": [float(len(os.listdir("/proc/self/fd")))],
    }


def summary(figures: dict[str, Any]) -> dict[str, float]:
    """Medians of the first and the last tenth of the saves, and their ratio."""
    found = {}
    for key in ("blocked", "durable", "boundary"):
        values = figures[key]
        few = max(1, len(values) // 10)
        early, late = statistics.median(values[:few]), statistics.median(values[-few:])
        found |= {f"{key} early s": early, f"{key} late s": late, f"{key} late / early": late / early}
    return found
