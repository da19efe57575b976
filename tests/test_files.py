"""Files that survive a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_disks import Disk, mounted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfe_hpc.errors import ConfigError
from cfe_hpc.files import append_ndjson, lay_up, read_ndjson, read_toml, write_atomic

RECORDS = st.dictionaries(
    st.text(max_size=8), st.text(max_size=8) | st.integers() | st.none() | st.booleans(), max_size=4
)
SHARED_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as disk:
        yield disk


def test_on_a_full_disk_spares_take_what_must_be_written(small_disk: Disk) -> None:
    path, spares = small_disk.path / "file", [small_disk.path / f"spare-{number}" for number in range(3)]
    assert lay_up(spares, 8192)
    write_atomic(path, "old")
    small_disk.fill()
    before = sorted(small_disk.path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert (path.read_text(), sorted(small_disk.path.iterdir())) == ("old", before)
    for content in ("new", "newer" * 1600):
        write_atomic(path, content, spares=spares)
        small_disk.fill()  # what was in use before is free now, and somebody takes it
        assert path.read_text() == content
    assert sorted(small_disk.path.iterdir()) == [small_disk.path / "ballast", path, spares[2]]
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "x" * 100_000, spares=spares)
    assert sorted(small_disk.path.iterdir()) == [small_disk.path / "ballast", path]
    assert not lay_up(spares, 1 << 20)


def test_a_line_that_a_full_disk_takes_in_part_is_told_and_the_next_is_whole(small_disk: Disk) -> None:
    path = small_disk.path / "lines"
    append_ndjson(path, {"a": 1})
    ballast = small_disk.fill()
    with pytest.raises(OSError, match="No space left"):
        append_ndjson(path, {"a": "x" * 10_000})
    assert path.stat().st_size == 4096
    ballast.unlink()
    append_ndjson(path, {"a": 2})
    assert list(read_ndjson(path)) == [{"a": 1}, {"a": 2}]


def test_readers_never_see_a_half_written_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "0" * 100_000)
    program = (
        "import sys; from pathlib import Path; from cfe_hpc.files import write_atomic\n"
        "print('go', flush=True)\n"
        "for n in range(10**9): write_atomic(Path(sys.argv[1]), str(n % 10) * 100_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"go\n"
        for _ in range(200):
            text = path.read_text()
            assert len(text) == 100_000 and len(set(text)) == 1
        writer.send_signal(signal.SIGKILL)
    finally:
        writer.kill()
        writer.wait(timeout=30)
        if writer.stdout is not None:
            writer.stdout.close()
    text = path.read_text()
    assert len(text) == 100_000 and len(set(text)) == 1


@SHARED_FOLDER
@given(records=st.lists(RECORDS, max_size=6))
def test_ndjson_reads_back(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "log.ndjson"
    path.unlink(missing_ok=True)
    for record in records:
        append_ndjson(path, record)
    assert list(read_ndjson(path)) == records


@SHARED_FOLDER
@given(records=st.lists(RECORDS.filter(bool), min_size=1, max_size=4), cut=st.integers(1, 400))
def test_a_torn_line_costs_itself_alone(tmp_path: Path, records: list[dict[str, Any]], cut: int) -> None:
    path = tmp_path / "log.ndjson"
    path.unlink(missing_ok=True)
    for record in records:
        append_ndjson(path, record)
    whole = path.read_bytes()
    kept = whole[: max(0, len(whole) - cut)]
    path.write_bytes(kept)
    append_ndjson(path, {"after": 1})
    read = list(read_ndjson(path))
    survivors = kept.count(b"\n")
    # A cut that takes the newline alone leaves a line that still parses.
    assert read[-1] == {"after": 1}
    assert read[:survivors] == records[:survivors]
    assert len(read) <= survivors + 2


def test_appenders_of_several_processes_do_not_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    program = (
        "import sys; from pathlib import Path; from cfe_hpc.files import append_ndjson\n"
        "for n in range(200): append_ndjson(Path(sys.argv[1]), {'who': sys.argv[2], 'n': n, 'pad': 'x' * 500})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), str(who)]) for who in range(4)]
    try:
        assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    finally:
        for writer in writers:
            writer.kill()
            writer.wait(timeout=30)
    lines = path.read_text().splitlines()
    read = [json.loads(line) for line in lines if line]
    for who in "0123":
        assert [record["n"] for record in read if record["who"] == who] == list(range(200))


@pytest.mark.parametrize("torn", [b'{"a": 1', b'"b": 2}', b"", b"\xff", b"[1]", b'{"a": 1}, {"a": 2}'])
def test_a_torn_line_costs_no_other(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "log.ndjson"
    whole = [b'{"n": %d}' % n for n in range(600)]
    path.write_bytes(b"\n".join([*whole[:300], torn, *whole[300:]]) + b"\n")
    assert list(read_ndjson(path)) == [{"n": n} for n in range(600)]


def test_ndjson_has_words_for_what_json_has_not(tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    append_ndjson(path, {"loss": float("nan"), "deep": [{"x": float("-inf")}], "text": "a\nb\u2028é"})
    assert path.read_text().count("\n") == 1
    assert list(read_ndjson(path)) == [{"loss": "nan", "deep": [{"x": "-inf"}], "text": "a\nb\u2028é"}]


def test_a_missing_ndjson_is_empty(tmp_path: Path) -> None:
    assert list(read_ndjson(tmp_path / "none")) == []


def test_lines_that_are_no_objects_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    path.write_bytes(b'{"a": 1}\n[1]\n\xff\xfe\n\n{"b"\n{"c": 3}\n')
    assert list(read_ndjson(path)) == [{"a": 1}, {"c": 3}]


def test_read_toml_names_the_file_as_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(ConfigError, match=r"^shown: no such file; check the path$"):
        read_toml(path, shown_as="shown")
    path.write_text("a = 1\na = 2\n")
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 2"):
        read_toml(path)
