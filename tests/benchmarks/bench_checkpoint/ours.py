"""cfe_hpc's own saves: synchronous, beside training, and beside training with the copy overlapped."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from typing import Any

from bench_checkpoint.ways import Way
from cfe_hpc.checkpoints.beside.background import Background
from cfe_hpc.checkpoints.keeping.rotation import Retention
from cfe_hpc.checkpoints.store import resume, save
from cfe_hpc.checkpoints.tracked import Capturing, restore

RUN = "benchmark"


class Save(Way):
    """store.save: training waits until the checkpoint is committed."""

    def save(self, folder: Path) -> None:
        save(folder, self._content(), step=1, attempt=0, run_id=RUN, group=self.place.group)

    def load(self, folder: Path) -> None:
        group = self.place.group
        opened = resume(
            folder, lambda found: restore(found, self._objects(), group=group), run_id=RUN, attempt=1, group=group
        )
        assert opened is not None

    def _objects(self) -> dict[str, Any]:
        return {"state": self.state}

    @functools.cached_property
    def _capturing(self) -> Capturing:
        return Capturing(self._objects(), group=self.place.group)

    def _content(self) -> Any:
        return self._capturing.take()


class Beside(Save):
    """Background: training waits for the copy, or with `overlap` only where it is not done when it is needed.

    Memory and writers are there before the first save, as they are in a run.
    """

    asynchronous = True

    def __init__(self, *args: Any, overlap: bool = False) -> None:
        super().__init__(*args)
        self._overlap = overlap
        self._made: Background | None = None
        self._moments: dict[str, float] = {}

    @property
    def _saves(self) -> Background:
        assert self._made is not None
        return self._made

    def start(self) -> None:
        if self._made is not None:
            return
        self._made = Background(
            root=Path(),
            run_id=RUN,
            attempt=0,
            group=self.place.group,
            policy=Retention(keep_last=1),
            overlap=self._overlap,
            ranks_here=self.place.size,
        )
        self._made.start()
        self._made.reserve(self._content())

    def begin(self, folder: Path) -> None:
        self._moments = {}
        self._saves.root = folder
        content = self._capturing.take(self._saves.is_ready)
        self._moments["called"] = time.monotonic()
        self._saves.begin(content, step=1)
        if self._overlap:
            threading.Thread(target=self._await_and_mark, daemon=True).start()

    def _await_and_mark(self) -> None:
        self._saves.settle()
        self._moments["staged"] = time.monotonic()

    def await_staged(self) -> None:
        self._saves.settle()

    def staged_s(self) -> float | None:
        return self._moments.get("staged")

    def busy(self) -> bool:
        return self._saves.busy()

    def advance(self, busy: bool) -> float | None:
        before = time.monotonic()
        info = self._saves.advance(busy)
        if info is None:
            return None
        # Rank 0's writer knows when; capturing went before the call that its seconds count from.
        return min(before, self._moments["called"] + info.seconds)

    def release(self) -> None:
        if self._made is not None:
            self._made.close()
        self._made = None


OURS: dict[str, Any] = {
    "cfe": Save,
    "cfe-async": Beside,
    "cfe-overlap": functools.partial(Beside, overlap=True),
}
