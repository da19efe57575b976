"""Whether a checkpoint costs the same after many steps, and beside many others: small saves, the one kind in turn with
the other, so that both meet the same machine."""

from __future__ import annotations

import random
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from bench_checkpoint.cluster import Ranks
from bench_checkpoint.rounds import folder_in, merged

STATE_BYTES = 5_000_000
RANKS = 2
EARLY_SAVES = 10
STEPS_BETWEEN = 50
MANY = 500
PAIRS = 40
AT_MOST = 1.2
"""The goal: medians of small saves that sync are not told apart more finely."""


class Saves:
    """A rank's small asynchronous saves, one after the other, with the boundaries of steps in between."""

    def __init__(self, state: Any, group: Any, keep: int) -> None:
        from bench_checkpoint.ours import RUN
        from cfe_hpc.checkpoints.beside.background import Background
        from cfe_hpc.checkpoints.keeping.rotation import Retention
        from cfe_hpc.checkpoints.tracked import Capturing

        self._group = group
        self._capturing = Capturing({"state": state}, group=group)
        policy = Retention(keep_last=keep)
        self._saves = Background(root=Path(), run_id=RUN, attempt=0, group=group, policy=policy)
        self._saves.start()
        self._saves.reserve(self._capturing.take())
        self._step = 0

    def run(self, folder: Path, saves: int, steps_between: int) -> dict[str, list[float]]:
        """Seconds that each save blocked, and until it was durable."""
        self._saves.root = folder
        blocked, durable = [], []
        for _ in range(saves):
            self._step += steps_between
            self._group.barrier()
            began = time.monotonic()
            self._saves.begin(self._capturing.take(self._saves.is_ready), step=self._step)
            blocked.append(time.monotonic() - began)
            for _ in range(steps_between):
                busy = bool(self._group.all_max([int(self._saves.busy())])[0])
                if (info := self._saves.advance(busy)) is not None:
                    durable.append(info.seconds)
            if (info := self._saves.finish()) is not None:
                durable.append(info.seconds)
        return {"blocked": blocked, "durable": durable}

    def close(self) -> None:
        """End the writer."""
        self._saves.close()


def measure(parent: Path, saves: int) -> dict[str, Any]:
    """Late saves beside early ones, and saves into a full folder beside those into one with few."""
    with folder_in(parent) as root, closing(Ranks(RANKS, parent)) as old, closing(Ranks(RANKS, parent)) as new:
        for members in (old, new):
            members.ask("make", state_bytes=STATE_BYTES, limits=False)
            members.ask("start_small", keep=3)
        _small(old, root / "old", saves=saves, steps_between=STEPS_BETWEEN)
        _small(new, root / "new", saves=EARLY_SAVES, steps_between=1)
        late = _pairs({"late": (old, root / "old"), "early": (new, root / "new")}, "late", "early")
        old.ask("start_small", keep=2 * MANY)
        _small(old, root / "full", saves=MANY, steps_between=1)
        full = _pairs({"full": (old, root / "full"), "few": (old, root / "few")}, "full", "few")
    return {"steps": late | {"steps": saves * STEPS_BETWEEN}, "folder": full | {"checkpoints": MANY}}


def _small(members: Ranks, folder: Path, *, saves: int, steps_between: int) -> dict[str, Any]:
    return merged(
        members.ask("save_small", folder=str(folder), saves=saves, steps_between=steps_between, timeout_s=600.0)
    )


def _pairs(sides: dict[str, tuple[Ranks, Path]], above: str, below: str) -> dict[str, Any]:
    found: dict[str, Any] = {side: {"blocked": [], "durable": []} for side in sides}
    for number in range(PAIRS):
        for side in random.Random(number).sample(sorted(sides), len(sides)):
            figures = _small(*sides[side], saves=1, steps_between=1)
            for key, values in found[side].items():
                values += figures[key]
    for key in ("blocked", "durable"):
        high, low = (statistics.median(found[side][key]) for side in (above, below))
        found |= {f"{key} {above} s": high, f"{key} {below} s": low, f"{key} {above} / {below}": high / low}
    return found
