"""Carrying a case out: rounds in which every limit and every way has its turn, in random order."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_checkpoint import files
from bench_checkpoint.cluster import Ranks, RanksFailed
from bench_checkpoint.plan import BARE, DECOUPLED, LOADED, Case

STEP_S = 0.03
FORWARD_BACKWARD_COPIES = 3
"""Undisturbed computing from one change of the state to the next, beside a copy of the state: in training of any
size it is far more."""

_DECOUPLED_TIMEOUT_S = 120.0
_TIMEOUT_S = 240.0


class Progress:
    """Lines on stderr: where we are, and how long it still takes."""

    def __init__(self, total: float) -> None:
        self._total, self._done, self._started_s = total, 0.0, time.monotonic()

    def add(self, weight: float, what: str) -> None:
        """Some of the total is done."""
        self._done += weight
        passed_s = time.monotonic() - self._started_s
        left_s = passed_s * max(0.0, self._total - self._done) / self._done
        print(f"[{passed_s / 60:5.1f} min, {left_s / 60:5.1f} left] {what}", file=sys.stderr, flush=True)


@contextmanager
def folder_in(parent: Path) -> Iterator[Path]:
    """A folder that is gone after the block."""
    made = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ranks' figures as one: the longest time, the sum of bytes, lists of rank 0."""
    figures: dict[str, Any] = {}
    for key, value in answers[0].items():
        values = [answer[key] for answer in answers if key in answer]
        if key.endswith("_s"):
            figures[key] = round(max(values), 6)
        elif key.endswith("_bytes"):
            figures[key] = sum(values)
        else:
            figures[key] = [round(each, 5) for each in value]
    return figures


class Bench:
    """The ranks of one size of state, and the cases that they carry out."""

    def __init__(self, folder: Path, every: Sequence[int], rounds: int) -> None:
        self._folder, self._every, self._rounds = folder, every, rounds
        self._ranks: dict[int, Ranks] = {}

    def run(self, case: Case, progress: Progress) -> dict[str, Any]:
        """All rounds of a case; the first is of first saves, and counts for nothing else.

        What fails is told by its reason and has no more turns; ranks start anew after it.
        """
        found: dict[str, Any] = {"rounds": [], "failed": {}}
        if case.zero:
            self.close()
        try:
            members = self._ready(case, found)
            for number in range(self._rounds + 1):
                members = self._round(case, members, number, found)
                progress.add(case.weight(), f"{case.name}: round {number} of {self._rounds}")
            members.ask("drop")
        except RanksFailed as error:
            found["failed"]["all"] = str(error)
            self.close()
        if case.zero:
            self.close()
        return found

    def close(self) -> None:
        """End all ranks."""
        for members in self._ranks.values():
            members.close()
        self._ranks = {}

    def _members(self, size: int) -> Ranks:
        if size not in self._ranks:
            self._ranks[size] = Ranks(size, self._folder)
        return self._ranks[size]

    def _ready(self, case: Case, found: dict[str, Any]) -> Ranks:
        members = self._members(case.ranks)
        found["step_s"] = merged(members.ask("calibrate", step_s=STEP_S))["step_s"]
        words: dict[str, Any] = {"state_bytes": case.state_bytes}
        if case.zero:
            made = members.ask("make_zero", **words, stage=case.zero, decoupled=case.decoupled)
        else:
            made = members.ask("make", **words)
        found["state_bytes"] = merged(made)["state_bytes"]
        found["keep"] = _fits(case, found["state_bytes"])
        return members

    def _round(self, case: Case, members: Ranks, number: int, found: dict[str, Any]) -> Ranks:
        figures: dict[str, Any] = {}
        found["rounds"].append(figures)
        for unit in _order(case, number):
            if unit in found["failed"]:
                continue
            copy_s = found.get("copy_s", 0.1)
            try:
                with folder_in(self._folder) as folder:
                    act = self._act(case, members, unit, folder, number == 0, found["keep"], copy_s)
                    began = time.monotonic()
                    answer = act()
                    figures[unit] = answer | {"wall_s": round(time.monotonic() - began, 3)}
            except RanksFailed as error:
                print(f"{case.name}: {unit} failed: {error}", file=sys.stderr, flush=True)
                found["failed"][unit] = str(error)
                self.close()
                members = self._ready(case, found)
            if unit.startswith("copy") and unit in figures:
                found["copy_s"] = figures[unit]["copy_s"]
        return members

    def _act(
        self, case: Case, members: Ranks, unit: str, folder: Path, first: bool, keep: bool, copy_s: float
    ) -> Callable[[], dict[str, Any]]:
        kind, _, option = unit.partition(" ")
        if kind == "copy":
            return lambda: merged(members.ask("copy", threads=int(option)))
        if kind == "bare":
            return lambda: merged(members.ask("bare", folder=str(folder), direct=option == "direct"))
        if unit == DECOUPLED:
            return lambda: self._decoupled(members, folder)
        forward_backward_s = FORWARD_BACKWARD_COPIES * copy_s
        if unit == BARE:
            return lambda: self._bare_beside(members, folder, forward_backward_s)
        return lambda: self._save_and_load(case, members, unit, folder, first, keep, forward_backward_s)

    def _decoupled(self, members: Ranks, folder: Path) -> dict[str, Any]:
        figures = merged(members.ask("decoupled", folder=str(folder), timeout_s=_DECOUPLED_TIMEOUT_S))
        return figures | {"file_bytes": files.size_bytes(folder)}

    def _bare_beside(self, members: Ranks, folder: Path, forward_backward_s: float) -> dict[str, Any]:
        asked = members.ask("bare_beside", folder=str(folder), forward_backward_s=forward_backward_s)
        return merged(asked) | {"file_bytes": files.size_bytes(folder)}

    def _save_and_load(
        self, case: Case, members: Ranks, way: str, folder: Path, first: bool, keep: bool, forward_backward_s: float
    ) -> dict[str, Any]:
        figures = merged(
            members.ask(
                "save", way=way, folder=str(folder), first=first, keep=keep,
                forward_backward_s=forward_backward_s, timeout_s=_TIMEOUT_S,
            )
        )  # fmt: skip
        figures["file_bytes"] = files.size_bytes(folder)
        if way in LOADED:
            figures |= merged(members.ask("load", way=way, folder=str(folder), timeout_s=_TIMEOUT_S))
        for size in case.moved(way, self._every):
            others = self._members(size)
            others.ask("make", state_bytes=case.state_bytes, limits=False)
            loaded = merged(others.ask("load", way=way, folder=str(folder), timeout_s=_TIMEOUT_S))
            figures[f"load_on_{size}_s"] = loaded["load_s"]
            others.ask("drop")
        return figures


def _order(case: Case, number: int) -> list[str]:
    """The first round begins with a copy: how long training computes beside a save is a multiple of it."""
    units = case.units()
    shuffled = random.Random(f"{case.name} {number}").sample(units, len(units))
    return sorted(shuffled, key=lambda unit: not unit.startswith("copy")) if number == 0 else shuffled


def _fits(case: Case, state_bytes: int) -> bool:
    """Whether every way may keep its staging memory from round to round; else each makes it anew, untimed."""
    staging = sum("async" in way or "overlap" in way for way in case.ways)
    return state_bytes * (2 + staging) < 0.6 * available_bytes()


def available_bytes() -> int:
    """Memory of the machine that is free or can be."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
