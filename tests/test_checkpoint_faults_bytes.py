"""Bits flipped, files swapped, cut and missing: `checkpoints verify` finds all of it, and names it.

A resume finds what lies in anything it uses: the manifest, all indexes, all headers and sizes, and every chunk of 8 MiB
that holds a byte which some rank asks for. What it does not use (another rank's own tensors at a smaller world size)
it neither reads nor checks. In no case does it hand out a wrong byte.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoint_groups import all_good, run_ranks
from run_specs import run_spec

from cfe_hpc.checkpoints import store
from cfe_hpc.checkpoints.agree import all_ranks
from cfe_hpc.checkpoints.layout import CHUNK_BYTES
from cfe_hpc.checkpoints.protocols import Piece
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.cli.main import main
from cfe_hpc.runfolder import RunFolder

FLIPS = 500 if os.environ.get("CFE_TEST_FULL") else 40
SEED = int(os.environ.get("CFE_TEST_SEED", "1"))
RUN_ID = "demo-20260131-120000-00aa"
STEP, OLDER = "step-000000002", "step-000000001"
FILES = [f"shard-{rank:05d}.{end}" for rank in (0, 1) for end in ("bin", "json")]


@cache
def body(step: int, size: int) -> bytes:
    return random.Random(f"w {step}").randbytes(size)


@cache
def own(step: int, rank: int, size: int) -> bytes:
    return random.Random(f"mine {step} {rank}").randbytes(size - 100 + rank)


def put(root: Path, step: int, size: int, *, ranks: int = 2, run_id: str = RUN_ID) -> None:
    """A checkpoint whose shared tensor and each rank's own have about `size` bytes."""
    whole = memoryview(body(step, size))

    def work(group: Any) -> None:
        low, high = size * group.rank // ranks, size * (group.rank + 1) // ranks
        mine = memoryview(own(step, group.rank, size))
        content = store.Content(
            pieces=[Piece(name="w", dtype="uint8", shape=(size,), start=low, data=whole[low:high])],
            own=[Piece(name="mine", dtype="uint8", shape=(len(mine),), start=0, data=mine)],
            state={"rank": group.rank},
            layout={"facts": {}, "objects": {}},
        )
        store.save(root, content, step=step, attempt=0, run_id=run_id, group=group)

    all_good(run_ranks(ranks, work))


def resume(root: Path, size: int, readers: int) -> tuple[int, list[str]]:
    """The step that `readers` ranks resume from, each with its part of the shared tensor, compared bit for bit; and
    what was reported of newer ones."""
    reports: list[str] = []

    def work(group: Any) -> int:
        got: dict[str, bytearray] = {}

        def load(opened: Opened) -> None:
            def read() -> bytes:
                low, high = size * group.rank // readers, size * (group.rank + 1) // readers
                mine = opened.own(group.rank)
                got.update(w=bytearray(high - low), mine=bytearray(mine.describe("mine")[1][0]))
                opened.reader.enqueue("w", low, memoryview(got["w"]))
                mine.enqueue("mine", 0, memoryview(got["mine"]))
                opened.reader.flush()
                return b""

            all_ranks(group, read)

        opened = store.resume(
            root,
            load,
            run_id=RUN_ID,
            attempt=1,
            group=group,
            report=lambda path, why: reports.append(f"{path.name}: {why}"),
        )
        assert opened is not None
        low, high = size * group.rank // readers, size * (group.rank + 1) // readers
        assert got["w"] == body(opened.step, size)[low:high]
        assert got["mine"] == own(opened.step, opened.saved_by(group.rank), size)
        assert opened.state(group.rank) == {"rank": opened.saved_by(group.rank)}
        return opened.step

    (step,) = set(all_good(run_ranks(readers, work)))
    return step, reports


def verify(run: Path, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What `checkpoints verify` says is wrong with the newer checkpoint; None when it says that it is whole."""
    code = main(["checkpoints", "verify", str(run), "--step", "2", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], code) == (STEP, int(not row["verified"]))
    return row["reason"]


def new_run(path: Path, size: int) -> Path:
    run = RunFolder(path / RUN_ID)
    run.checkpoints.mkdir(parents=True)
    run_spec(run_id=RUN_ID, name="demo").write(run.run_toml)
    for step in (1, 2):
        put(run.checkpoints, step, size)
    return run.path


def flip(path: Path, place: int, bit: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(fd, 1, place)
        os.pwrite(fd, bytes([byte ^ 1 << bit]), place)
    finally:
        os.close(fd)


def used_chunks(folder: Path, readers: int) -> set[tuple[str, int]]:
    """(data file, chunk) of everything that `readers` ranks ask for, by the indexes."""
    used = set()
    for rank in range(2):
        index = json.loads((folder / f"shard-{rank:05d}.json").read_bytes())
        # Ranks that were not there at the save take rank 0's own.
        takers = [reader for reader in range(readers) if (reader if reader < 2 else 0) == rank]
        for extent in [*index["shared"], *(index["own"] if takers else [])]:
            low, high = extent["offset"], extent["offset"] + extent["count"]
            used |= {(f"shard-{rank:05d}.bin", chunk) for chunk in range(low // CHUNK_BYTES, -(-high // CHUNK_BYTES))}
    return used


@pytest.mark.slow
def test_every_flipped_bit_is_found_and_named_and_no_wrong_byte_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 12 << 20  # data files of three chunks: the last two of rank 1 hold nothing but its own tensor
    run = new_run(tmp_path, size)
    root, folder = run / "checkpoints", run / "checkpoints" / STEP
    used = {readers: used_chunks(folder, readers) for readers in (1, 2, 3)}
    assert {len(chunks) for chunks in used.values()} == {4, 6}
    assert (verify(run, capsys), resume(root, size, 2)) == (None, (2, []))
    outcomes: Counter[str] = Counter()
    for number in range(FLIPS):
        rng = random.Random(f"{SEED} {number}")
        file, readers = folder / rng.choice([*FILES, "manifest.json"]), rng.choice([1, 2, 3])
        # Headers and the last, padded blocks are small: they get a share of their own.
        end = file.stat().st_size
        low, high = rng.choice([(0, end), (0, end), (0, min(end, 4096)), (max(0, end - 4096), end)])
        place, bit = rng.randrange(low, high), rng.randrange(8)
        what = f"CFE_TEST_SEED={SEED}: flip {number}, bit {bit} of byte {place} of {file.name}, {readers} ranks"
        flip(file, place, bit)
        try:
            found = verify(run, capsys)
            assert file.name in (found or ""), (what, found)
            step, reports = resume(root, size, readers)
        finally:
            flip(file, place, bit)
        in_use = file.suffix == ".json" or place < 4096 or (file.name, place // CHUNK_BYTES) in used[readers]
        assert step == (1 if in_use else 2), (what, reports)
        assert [report.startswith(f"{STEP}: ") and file.name in report for report in reports] == [True] * in_use, what
        outcomes[f"{file.suffix} {'in use' if in_use else 'not in use'}"] += 1
    assert (verify(run, capsys), resume(root, size, 3)) == (None, (2, []))
    assert outcomes.keys() == {".bin in use", ".bin not in use", ".json in use"}
    print(f"CFE_TEST_SEED={SEED}: {dict(outcomes)}")


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def append(path: Path, content: bytes) -> None:
    with open(path, "ab") as stream:
        stream.write(content)


def blank(path: Path, low: int, high: int) -> None:
    """Zeros where data was, as a crashed filesystem leaves them."""
    with open(path, "r+b") as stream:
        stream.seek(low)
        stream.write(bytes(high - low))


def from_elsewhere(step: int, run_id: str, *names: str) -> Callable[[Path], None]:
    """Take files from another save: another run's, or the same step saved again."""

    def do(folder: Path) -> None:
        elsewhere = folder.parent.parent / "elsewhere"
        put(elsewhere, step, SMALL, run_id=run_id)
        for name in names:
            shutil.copy(elsewhere / f"step-{step:09d}" / name, folder)

    return do


def from_older(*names: str) -> Callable[[Path], None]:
    return lambda folder: [shutil.copy(folder.parent / OLDER / name, folder) for name in names] and None


SMALL = 20_000
BIN0, JSON0, BIN1, JSON1 = FILES
MANIFEST = "manifest.json"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data of another step": (from_older(BIN1), f"{BIN1} belongs to step 1, not 2"),
    "index of another step": (from_older(JSON1), f"{JSON1} belongs to step 1, not 2"),
    "rank of another step": (from_older(BIN1, JSON1), f"{JSON1} belongs to step 1, not 2"),
    "manifest of another step": (from_older(MANIFEST), f"{MANIFEST} belongs to step 1, not to the folder {STEP}"),
    "all of another step": (from_older(*FILES, MANIFEST), f"{MANIFEST} belongs to step 1"),
    "all but the data of another step": (from_older(JSON0, JSON1, MANIFEST), f"{MANIFEST} belongs to step 1"),
    "data of another run": (from_elsewhere(2, "other", BIN0), f"{BIN0} belongs to run other, not {RUN_ID}"),
    "rank of another run": (from_elsewhere(2, "other", BIN0, JSON0), f"{JSON0} belongs to run other, not {RUN_ID}"),
    "manifest of another run": (from_elsewhere(2, "other", MANIFEST), f"{MANIFEST} belongs to run other"),
    "all of another run": (from_elsewhere(2, "other", *FILES, MANIFEST), f"{MANIFEST} belongs to run other"),
    "data of another save": (from_elsewhere(2, RUN_ID, BIN1), f"{BIN1} belongs to another save of the same step"),
    "rank of another save": (
        from_elsewhere(2, RUN_ID, BIN1, JSON1),
        f"{JSON1} belongs to another save of the same step",
    ),
    "manifest of another save": (from_elsewhere(2, RUN_ID, MANIFEST), "belongs to another save of the same step"),
    "data of another rank": (lambda f: shutil.copy(f / BIN0, f / BIN1), f"{BIN1} belongs to rank 0, not 1"),
    "index of another rank": (lambda f: shutil.copy(f / JSON1, f / JSON0), f"{JSON0} belongs to rank 1, not 0"),
    "data swapped": (lambda f: swap(f / BIN0, f / BIN1), "belongs to rank"),
    "indexes swapped": (lambda f: swap(f / JSON0, f / JSON1), "belongs to rank"),
    "ranks swapped": (lambda f: (swap(f / BIN0, f / BIN1), swap(f / JSON0, f / JSON1)), "belongs to rank"),
    "index and data swapped": (lambda f: swap(f / BIN0, f / JSON0), JSON0),
    "index and manifest swapped": (lambda f: swap(f / JSON0, f / MANIFEST), f"{MANIFEST} is no cfe_hpc"),
    "a rank's files missing": (lambda f: ((f / BIN1).unlink(), (f / JSON1).unlink()), f"{JSON1} is missing"),
    "data missing": (lambda f: (f / BIN0).unlink(), f"{BIN0} is missing"),
    "index missing": (lambda f: (f / JSON0).unlink(), f"{JSON0} is missing"),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "all but the manifest missing": (lambda f: [(f / name).unlink() for name in FILES], "is missing"),
    "data cut to nothing": (lambda f: os.truncate(f / BIN1, 0), BIN1),
    "data cut in its header": (lambda f: os.truncate(f / BIN1, 100), BIN1),
    "data cut by a byte": (lambda f: os.truncate(f / BIN1, (f / BIN1).stat().st_size - 1), f"{BIN1} is truncated"),
    "data grown by a byte": (lambda f: append(f / BIN1, b"\0"), f"{BIN1} has grown"),
    "data grown by a block": (lambda f: append(f / BIN1, bytes(4096)), f"{BIN1} has grown"),
    "data doubled": (lambda f: append(f / BIN1, (f / BIN1).read_bytes()), f"{BIN1} has grown"),
    "data all zeros": (lambda f: blank(f / BIN1, 0, (f / BIN1).stat().st_size), f"{BIN1} is altered"),
    "data with a block of zeros": (lambda f: blank(f / BIN1, 8192, 12288), f"{BIN1} is altered: bytes 0 to"),
    "index cut by a byte": (lambda f: os.truncate(f / JSON1, (f / JSON1).stat().st_size - 1), f"{JSON1} is torn"),
    "index cut to nothing": (lambda f: os.truncate(f / JSON1, 0), f"{JSON1} is empty"),
    "index grown by a newline": (lambda f: append(f / JSON1, b"\n"), f"{JSON1} is torn or altered"),
    "index doubled": (lambda f: append(f / JSON1, (f / JSON1).read_bytes()), JSON1),
    "index all zeros": (lambda f: blank(f / JSON1, 0, (f / JSON1).stat().st_size), f"{JSON1} is torn or altered"),
    "manifest cut to nothing": (lambda f: os.truncate(f / MANIFEST, 0), f"{MANIFEST} is empty"),
    "manifest cut by a byte": (lambda f: os.truncate(f / MANIFEST, (f / MANIFEST).stat().st_size - 1), MANIFEST),
    "manifest grown by a newline": (lambda f: append(f / MANIFEST, b"\n"), f"{MANIFEST} is torn or altered"),
    "manifest doubled": (lambda f: append(f / MANIFEST, (f / MANIFEST).read_bytes()), MANIFEST),
    "a folder for a data file": (lambda f: ((f / BIN1).unlink(), (f / BIN1).mkdir()), BIN1),
    "a folder for a manifest": (lambda f: ((f / MANIFEST).unlink(), (f / MANIFEST).mkdir()), MANIFEST),
    "data linked to itself": (lambda f: ((f / BIN1).unlink(), (f / BIN1).symlink_to(BIN1)), BIN1),
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_run(tmp_path_factory.mktemp("small"), SMALL)


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_the_file_that_was_written_is_named_and_the_older_checkpoint_taken(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run = tmp_path / RUN_ID
    shutil.copytree(small_run, run)
    do, words = DAMAGE[kind]
    do(run / "checkpoints" / STEP)
    shutil.rmtree(run / "elsewhere", ignore_errors=True)
    found = verify(run, capsys)
    assert words in (found or ""), found
    for readers in (1, 2, 3):
        step, reports = resume(run / "checkpoints", SMALL, readers)
        assert step == 1 and len(reports) == 1, reports
        assert words in reports[0] and reports[0].startswith(STEP) and "\n" not in reports[0]
