"""Saves that fail and checkpoints that are damaged: one clear message on every rank, and the one before is used."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_groups import ThreadGroup, all_good, run_ranks

from cfe_hpc.checkpoints import drafts, folders
from cfe_hpc.checkpoints.io import shard
from cfe_hpc.checkpoints.io.shard import header
from cfe_hpc.checkpoints.io.staging import Source
from cfe_hpc.checkpoints.layout import place
from cfe_hpc.checkpoints.manifest import Identity, Manifest
from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.store import CheckpointInfo, Content, newest, save
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint, DiskFull

BYTES = 30_000


def body(step: int) -> bytes:
    return random.Random(step).randbytes(BYTES)


def content(step: int, group) -> Content:
    whole, low, high = body(step), BYTES * group.rank // group.size, BYTES * (group.rank + 1) // group.size
    own = random.Random(-step).randbytes(100 + group.rank)
    return Content(
        pieces=[Piece(name="w", dtype="uint8", shape=(BYTES,), start=low, data=memoryview(whole)[low:high])],
        own=[Piece(name="mine", dtype="uint8", shape=(len(own),), start=0, data=memoryview(own))],
        state={"step": step, "rank": group.rank},
        layout={"engine": "test"},
    )


def put(root: Path, group, step: int, *, attempt: int = 0, run_id: str = "run-1", **options) -> CheckpointInfo:
    return save(root, content(step, group), step=step, attempt=attempt, run_id=run_id, group=group, **options)


def find(root: Path, group, *, attempt: int = 1) -> tuple[int | None, list[tuple[str, str]]]:
    """The step that is resumed from, its content checked, and what was reported."""
    reports: list[tuple[str, str]] = []
    opened = newest(
        root,
        run_id="run-1",
        attempt=attempt,
        group=group,
        report=lambda path, why: reports.append((path.name, why)),
    )
    if opened is None:
        return None, reports
    out = bytearray(BYTES)
    opened.reader.read_into("w", 0, memoryview(out))
    mine = bytearray(100 + opened.saved_by(group.rank))
    opened.own(group.rank).read_into("mine", 0, memoryview(mine))
    assert out == body(opened.step)
    assert mine == random.Random(-opened.step).randbytes(len(mine))
    assert opened.state(group.rank) == {"step": opened.step, "rank": opened.saved_by(group.rank)}
    return opened.step, reports


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1 and 2 by two ranks."""
    path = tmp_path / "checkpoints"
    for step in (1, 2):
        all_good(run_ranks(2, lambda group, step=step: put(path, group, step)))
    return path


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_the_newest_is_found_by_any_number_of_ranks(root: Path, readers: int) -> None:
    assert all_good(run_ranks(readers, lambda group: find(root, group))) == [(2, [])] * readers


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert find(tmp_path / "none", SoloGroup()) == (None, [])


STEP = "step-000000002"
DAMAGE = {
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json is empty"),
    "manifest torn": (lambda f: os.truncate(f / "manifest.json", 200), "manifest.json is torn or altered"),
    "manifest replaced": (
        lambda f: shutil.copy(f.parent / "step-000000001" / "manifest.json", f),
        "manifest.json belongs to step 1",
    ),
    "index missing": (lambda f: (f / "shard-00001.json").unlink(), "shard-00001.json is missing"),
    "data missing": (lambda f: (f / "shard-00001.bin").unlink(), "shard-00001.bin is missing"),
    "data truncated": (lambda f: os.truncate(f / "shard-00001.bin", 5000), "shard-00001.bin is truncated: 5000 bytes"),
    "data empty": (lambda f: os.truncate(f / "shard-00000.bin", 0), "shard-00000.bin is altered"),
    "data grown": (lambda f: os.truncate(f / "shard-00000.bin", 99_999), "shard-00000.bin has grown"),
    "data of another step": (
        lambda f: shutil.copy(f.parent / "step-000000001" / "shard-00001.bin", f),
        "shard-00001.bin belongs to step 1, not 2",
    ),
    "shard of another step": (
        lambda f: [shutil.copy(f.parent / "step-000000001" / f"shard-00001.{end}", f) for end in ("bin", "json")],
        "shard-00001.json belongs to step 1, not 2",
    ),
    "shard of another rank": (
        lambda f: [shutil.copy(f / f"shard-00000.{end}", f / f"shard-00001.{end}") for end in ("bin", "json")],
        "shard-00001.json belongs to rank 0, not 1",
    ),
    "data of another rank": (
        lambda f: shutil.copy(f / "shard-00000.bin", f / "shard-00001.bin"),
        "shard-00001.bin belongs to rank 0, not 1",
    ),
    "the folder of another step": (
        lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / "step-000000001", f)),
        "manifest.json belongs to step 1",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(root: Path, kind: str) -> None:
    do, words = DAMAGE[kind]
    do(root / STEP)
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    (step, reports), (other_step, none) = all_good(run_ranks(2, lambda group: find(root, group)))
    assert (step, other_step, none) == (1, 1, [])
    assert [name for name, _ in reports] == [STEP]
    assert words in reports[0][1] and "\n" not in reports[0][1]
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before


def test_a_shard_of_another_run_is_refused(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    all_good(run_ranks(2, lambda group: put(elsewhere, group, 2, run_id="run-2")))
    for end in ("bin", "json"):
        shutil.copy(elsewhere / STEP / f"shard-00000.{end}", root / STEP)
    (step, reports), _ = all_good(run_ranks(2, lambda group: find(root, group)))
    assert step == 1 and "shard-00000.json belongs to run run-2, not run-1" in reports[0][1]
    shutil.rmtree(root / STEP)
    shutil.copytree(elsewhere / STEP, root / STEP)
    step, reports = find(root, SoloGroup())
    assert step == 1 and reports == [(STEP, "manifest.json belongs to run run-2, not run-1")]


def test_a_shard_of_another_save_of_the_same_step_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / STEP, tmp_path / "former")
    all_good(run_ranks(2, lambda group: put(root, group, 2)))
    for end in ("bin", "json"):
        shutil.copy(tmp_path / "former" / f"shard-00001.{end}", root / STEP)
    step, reports = find(root, SoloGroup())
    assert step == 1 and reports == [(STEP, "shard-00001.json belongs to another save of the same step")]


def test_when_none_verifies_that_is_an_error_everywhere(root: Path) -> None:
    for step in ("step-000000001", STEP):
        (root / step / "manifest.json").write_bytes(b"")
    for error in run_ranks(2, lambda group: find(root, group)):
        assert isinstance(error, CorruptCheckpoint)
        assert "none of 2 checkpoints" in str(error) and "step-000000002: manifest.json is empty" in str(error)


def test_any_flipped_bit_is_found(root: Path) -> None:
    rng = random.Random(7)
    files = sorted(path for path in (root / STEP).iterdir())
    for file in files:
        whole = file.read_bytes()
        places = {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(80))}
        for at in sorted(places):
            altered = bytearray(whole)
            altered[at] ^= 1 << rng.randrange(8)
            file.write_bytes(altered)
            step, reports = find(root, SoloGroup())
            assert step == 1, (file.name, at)
            assert file.name in reports[0][1], reports
        file.write_bytes(whole)
    assert find(root, SoloGroup()) == (2, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1.4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a filesystem")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(path)], check=True, timeout=20)
    yield path
    subprocess.run(["umount", str(path)], check=True, timeout=20)


def test_a_disk_too_small_is_told_before_anything_is_written(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    assert put(root, SoloGroup(), 1).step == 1
    (small_disk / "fill").write_bytes(bytes(400_000))
    errors = run_ranks(2, lambda group: put(root, group, 2))
    assert len({str(error) for error in errors}) == 1 and isinstance(errors[1], CheckpointError)
    assert "step-000000002: No space left on device: the checkpoint takes" in str(errors[1])
    assert os.listdir(root) == ["step-000000001"] and find(root, SoloGroup()) == (1, [])


def test_a_disk_that_fills_up_meanwhile(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small_disk / "checkpoints"
    put(root, SoloGroup(), 1)
    monkeypatch.setattr("cfe_hpc.checkpoints.drafts._MARGIN_BYTES", 0)

    def fill(moment: str) -> None:
        if moment == "draft-made":
            with pytest.raises(OSError, match="No space"), open(small_disk / "fill", "ab", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))

    errors = run_ranks(2, lambda group: put(root, group, 2, on_fault=fill if group.rank == 0 else lambda moment: None))
    assert len({str(error) for error in errors}) == 1 and isinstance(errors[0], CheckpointError)
    assert "shard-0000" in str(errors[0]) and "No space left on device" in str(errors[0])
    assert os.listdir(root) == ["step-000000001"] and find(root, SoloGroup()) == (1, [])
    (small_disk / "fill").unlink()
    all_good(run_ranks(2, lambda group: put(root, group, 2)))
    assert find(root, SoloGroup()) == (2, [])


def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    put(root, SoloGroup(), 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=20)
    errors = run_ranks(2, lambda group: put(root, group, 2))
    assert len({str(error) for error in errors}) == 1 and "Read-only file system" in str(errors[0])
    assert find(root, SoloGroup()) == (1, [])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["write", "fsync", "index"])
def test_a_rank_that_cannot_write_fails_all_with_one_message(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, rank: int, call: str
) -> None:
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    name = f"shard-{rank:05d}.{'json' if call == 'index' else 'bin'}"
    real_pwrite, real_fsync = os.pwrite, os.fsync

    def refuse(real, fd, *rest):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(name):
            raise OSError(code, os.strerror(code))
        return real(fd, *rest)

    if call == "write":
        monkeypatch.setattr(shard.os, "pwrite", lambda *args: refuse(real_pwrite, *args))
    else:
        monkeypatch.setattr(shard.os, "fsync", lambda *args: refuse(real_fsync, *args))
    errors = run_ranks(2, lambda group: put(root, group, 3))
    monkeypatch.undo()
    assert [str(error) for error in errors] == [f"rank {rank}: {name}: {os.strerror(code)}"] * 2
    kind = DiskFull if code in (errno.ENOSPC, errno.EDQUOT) else CheckpointError
    assert all(type(error) is kind for error in errors)
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before
    assert find(root, SoloGroup()) == (2, [])


def test_a_state_that_is_no_json_fails_all_ranks(root: Path) -> None:
    def work(group: ThreadGroup):
        made = content(3, group)
        state = {"odd": object()} if group.rank == 1 else made.state
        made = Content(pieces=made.pieces, own=made.own, state=state)
        return save(root, made, step=3, attempt=0, run_id="run-1", group=group)

    errors = run_ranks(2, work)
    assert len({str(error) for error in errors}) == 1 and "rank 1: TypeError" in str(errors[0])


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_the_same_step_again_replaces_what_was_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    (root / STEP / "shard-00000.bin").unlink()
    put(root, SoloGroup(), 2, attempt=1)
    assert find(root, SoloGroup(), attempt=2) == (2, [])
    assert sorted(name for name in os.listdir(root) if ".trash-" not in name) == ["step-000000001", STEP]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("at", range(3))
def test_a_death_between_the_renames_of_a_replacement_loses_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, at: int
) -> None:
    """Step 2 is saved again; the process dies before its `at`-th rename or exchange."""
    calls = iter(range(99))

    def deadly(real):
        def call(*args):
            if next(calls) == at:
                raise Killed
            return real(*args)

        return call

    real_exchange = folders._exchange if exchange else lambda one, other: False
    monkeypatch.setattr(folders, "_exchange", deadly(real_exchange))
    monkeypatch.setattr(folders.os, "rename", deadly(os.rename))
    try:
        put(root, SoloGroup(), 2, attempt=1)
        died = False
    except Killed:
        died = True
    monkeypatch.undo()
    assert died or (exchange and at == 2)
    assert find(root, SoloGroup(), attempt=2) == (2, [])
    assert [name for name in os.listdir(root) if ".tmp-" in name and ".trash-" not in name] == []


@pytest.mark.parametrize("moment", ["draft-made", "data-written", "index-written", "manifest-written", "committed"])
def test_what_dead_attempts_leave_is_settled_by_the_next(root: Path, moment: str) -> None:
    def die(now: str) -> None:
        if now == moment:
            raise Killed

    with pytest.raises(Killed):
        put(root, SoloGroup(), 3, on_fault=die)
    assert find(root, SoloGroup(), attempt=0)[0] == (3 if moment == "committed" else 2), "its own attempt may live"
    assert find(root, SoloGroup(), attempt=1)[0] == (3 if moment in ("manifest-written", "committed") else 2)
    assert [name for name in os.listdir(root) if ".tmp-" in name and ".trash-" not in name] == []


def test_metrics_and_layout_return_even_when_not_finite(tmp_path: Path) -> None:
    info = put(tmp_path, SoloGroup(), 5, metrics={"loss": 1.5, "bad": float("nan"), "top": float("inf")})
    manifest = Manifest.unseal((info.path / "manifest.json").read_bytes())
    assert manifest.metrics["loss"] == 1.5 and manifest.metrics["top"] == float("inf")
    assert manifest.metrics["bad"] != manifest.metrics["bad"]
    assert manifest.layout == {"engine": "test"} and info.size_bytes == manifest.size_bytes > BYTES


def test_indexes_are_read_at_a_commit_unless_their_extents_are_known_to_fit(tmp_path: Path) -> None:
    def drafted(step: int, *, gap: bool) -> tuple[Path, Manifest, str]:
        identity = Identity(run_id="run-1", step=step, attempt=0, world_size=1, token=drafts.new_token())
        draft = tmp_path / folders.draft_name(step, 0, identity.token)
        drafts.claim(draft, 1)
        data = body(step)[:1000] if gap else body(step)
        piece = Piece(name="w", dtype="uint8", shape=(BYTES,), start=0, data=memoryview(data))
        placement = place([piece])
        source = Source(header(identity, 0), placement, [piece.data])
        index = drafts.unwritten_index(identity, 0, placement, num_shared=1, state=step)
        facts = drafts.write_shard(draft, index, source)
        manifest = Manifest(identity=identity, time="now", layout={}, metrics={}, files=drafts.files([facts]))
        return draft, manifest, drafts.extents_digest(index)

    (first, one, whole), (second, two, same), (third, three, other) = (
        drafted(step, gap=step == 3) for step in (1, 2, 3)
    )
    assert whole == same != other
    drafts.commit(tmp_path, first, one)
    (second / "shard-00000.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"shard-00000\.json is missing"):
        drafts.commit(tmp_path, second, two, fits=True)
    with pytest.raises(CorruptCheckpoint, match="w"):
        drafts.commit(tmp_path, third, three)
    assert [name for name in os.listdir(tmp_path) if ".tmp" not in name] == ["step-000000001"]
