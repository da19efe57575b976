"""Token files of text and arrays: what they hold, how they are split, which sources are refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import os

import h5py
import numpy as np
import pytest

from cfe_hpc.data import build as building
from cfe_hpc.data.build import BuildOptions, build, build_from_paths
from cfe_hpc.data.check import check
from cfe_hpc.data.sources import find_sources, stdlib_sources
from cfe_hpc.errors import DataError, UsageError


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for number in range(60):
        (folder / "sub" / f"{number:02d}.txt").write_text(f"document {number}\nzwölf Häuser\n" * 20, encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_bytes(b"\xff")
    return folder


def documents_of(path, split):
    with h5py.File(path, "r") as file:
        starts = file[split]["documents"][...].astype(int)
        tokens = file[split]["tokens"][...]
    return [tokens[start:stop].tobytes() for start, stop in itertools.pairwise(starts)]


def test_text_comes_back_whole_and_in_order(texts, tmp_path):
    out = tmp_path / "out.h5"
    report = build_from_paths(out, [texts])
    train, held = documents_of(out, "train"), documents_of(out, "validation")
    written = [path.read_bytes() + b"\0" for path in sorted((texts / "sub").iterdir())]
    assert train == [document for document in written if document in train]
    assert sorted(train + held) == sorted(written)
    assert held
    assert (report.dtype, report.vocab_size, report.separator, report.num_sources) == ("uint8", 256, 0, 61)
    assert check(out).problems == []
    with h5py.File(out, "r") as file:
        assert file["train/tokens"].fletcher32
        sources = [json.loads(line) for line in file["sources"][...].tobytes().splitlines()]
    first = texts / "sub" / "00.txt"
    assert sources[1] == {
        "name": "texts/sub/00.txt",
        "bytes": first.stat().st_size,
        "sha256": hashlib.sha256(first.read_bytes()).hexdigest(),
        "documents": 1,
    }


def test_same_sources_same_bytes(texts, tmp_path):
    build_from_paths(tmp_path / "a.h5", [texts])
    build_from_paths(tmp_path / "b.h5", [texts])
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_the_split_is_of_content_alone(texts, tmp_path):
    """More text, other names and another order leave each document where it was; copies go with their originals."""
    build_from_paths(tmp_path / "a.h5", [texts], options=BuildOptions(validation_fraction=0.3))
    held = set(documents_of(tmp_path / "a.h5", "validation"))
    for path in list((texts / "sub").iterdir()):
        (texts / f"copy of {path.name}").write_bytes(path.read_bytes())
    (texts / "more.txt").write_text("something else\n")
    build_from_paths(tmp_path / "b.h5", [texts], options=BuildOptions(validation_fraction=0.3))
    held_now = set(documents_of(tmp_path / "b.h5", "validation")) - {b"something else\n\0"}
    assert held_now == held
    assert not held & set(documents_of(tmp_path / "b.h5", "train"))


def test_one_long_file_is_cut_at_lines_and_split(tmp_path):
    text = "".join(f"line {number} äöü\n" for number in range(5000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out.h5"
    build_from_paths(out, [tmp_path / "book.txt"], options=BuildOptions(max_document_tokens=4096, separator=None))
    train, held = documents_of(out, "train"), documents_of(out, "validation")
    assert held
    assert all(piece.endswith(b"\n") for piece in train + held)
    assert sorted(b"".join(train + held)) == sorted(text.encode())
    assert max(map(len, train + held)) < 4200


@pytest.mark.parametrize("length", [31, 32, 33, 1 << 20, (1 << 20) + 7])
def test_a_line_without_end_is_cut_between_characters(tmp_path, length):
    text = ("a€" * length)[:length]
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    options = BuildOptions(max_document_tokens=16, separator=None, validation_fraction=0)
    build_from_paths(tmp_path / "out.h5", [tmp_path / "line.txt"], options=options)
    pieces = documents_of(tmp_path / "out.h5", "train")
    assert b"".join(pieces).decode() == text
    assert max(map(len, pieces)) <= 32
    for piece in pieces[:100]:
        piece.decode()


def test_arrays_are_cut_at_the_separator(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([5, 6, 50256, 7, 8, 9, 50256, 50256, 10], dtype=np.int64))
    out = tmp_path / "out.h5"
    report = build_from_paths(out, [tmp_path / "ids.npy"], options=BuildOptions(separator=50256, validation_fraction=0))
    assert (report.dtype, report.vocab_size) == ("uint16", 50257)
    with h5py.File(out, "r") as file:
        assert file["train/tokens"].dtype == np.dtype("<u2")
        assert file["train/tokens"][...].tolist() == [5, 6, 50256, 7, 8, 9, 50256, 10, 50256]
    assert check(out).problems == []


def test_bin_and_rows_of_arrays(tmp_path):
    np.arange(300, dtype="<u2").tofile(tmp_path / "ids.bin")
    np.save(tmp_path / "rows.npy", np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8))
    out = tmp_path / "out.h5"
    build_from_paths(out, [tmp_path / "ids.bin", tmp_path / "rows.npy"], options=BuildOptions(validation_fraction=0))
    lengths = [len(document) // 2 for document in documents_of(out, "train")]
    assert lengths == [300, 3, 3]


def test_every_bad_source_is_named_at_once(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"fine until h\xe4user")
    (tmp_path / "binary.txt").write_bytes(b"ELF\0\1")
    (tmp_path / "hollow").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    np.save(tmp_path / "ids.npy", np.array([1]))
    names = ("latin.txt", "binary.txt", "hollow", "pipe", "broken", "missing.txt", "ids.npy")
    with pytest.raises(UsageError) as caught:
        build_from_paths(tmp_path / "out.h5", [tmp_path / name for name in names])
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert sorted(lines) == [
        "binary.txt: binary file (byte 3 is 0); name text files, or arrays as .npy or .bin",
        "broken: no such file or folder; remove the broken link",
        "hollow: folder without any file; name a folder with text files",
        "ids.npy: token ids among text files; build a file of one kind, or choose files with --include",
        "latin.txt: not UTF-8 text (byte 12 is 0xe4); convert it to UTF-8, with iconv for example",
        "missing.txt: no such file or folder; check the path",
        "pipe: neither a file nor a folder; name text files or .npy or .bin arrays",
    ]
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.array([1.5]), r"not token ids \(1 dimensions of float64\)"),
        ("a.npy", np.array([3, -1]), r"token id -1 at position 1 is not in 0 … 65535"),
        ("a.npy", np.array([70_000]), "token id 70000 at position 0"),
        ("a.npy", np.zeros((1, 1, 1), int), "3 dimensions"),
        ("a.npy", b"not numpy's", "not a .npy array"),
        ("a.bin", b"abc", r"odd size, 3 bytes"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(UsageError, match=message):
        build_from_paths(tmp_path / "out.h5", [path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation: not a share"),
        ({"validation_fraction": 0.99999}, "too few documents to hold some out"),
        ({"separator": 65}, r"--separator: may occur in text \(65\)"),
        ({"separator": 256, "dtype": "uint8"}, "uint8 is too narrow for a vocabulary of 257"),
        ({"dtype": "int4"}, r"--dtype: no such type \(int4\)"),
        ({"max_document_tokens": 3}, "--max-document: too short"),
        ({"vocab_size": 70_000}, "--vocab-size: out of range"),
    ],
)
def test_bad_options_are_refused(texts, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        build_from_paths(tmp_path / "out.h5", [texts], options=BuildOptions(**options))


def test_unusable_files_are_left_out_when_asked_to(texts, tmp_path):
    (texts / "bad.txt").write_bytes(b"\xff\xfe")
    options = BuildOptions(skip_unusable=True)
    report = build_from_paths(tmp_path / "out.h5", [texts], options=options)
    assert len(report.skipped) == 1
    assert "bad.txt: not UTF-8" in report.skipped[0]
    assert report.num_sources == 61


def test_nothing_is_replaced_unasked_and_nothing_left_behind(texts, tmp_path, monkeypatch):
    out = tmp_path / "out.h5"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists; give --force"):
        build_from_paths(out, [texts])

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "_write_header", fail)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        build_from_paths(out, [texts], options=BuildOptions(overwrite=True))
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "texts"]


def test_a_source_that_changes_meanwhile_is_noticed(texts, tmp_path):
    def meddle(what, done, total):
        if what == "writing":
            (texts / "sub" / "59.txt").write_text("changed")

    with pytest.raises(DataError, match=r"59\.txt: changed while it was read"):
        build_from_paths(tmp_path / "out.h5", [texts], progress=meddle)
    assert not (tmp_path / "out.h5").exists()


def test_folders_are_searched_by_pattern_and_each_file_taken_once(texts, tmp_path):
    (texts / "code.py").write_text("pass\n")
    sources, problems = find_sources([texts / "code.py", texts], include=["*.py"])
    assert ([source.name for source in sources], problems) == (["code.py"], [])


def test_the_standard_library_is_a_corpus(tmp_path):
    sources = stdlib_sources()
    report = build(tmp_path / "stdlib.h5", sources, options=BuildOptions(skip_unusable=True))
    assert report.source_bytes > 5_000_000
    assert report.splits["validation"].tokens > 100_000
    checked = check(tmp_path / "stdlib.h5")
    assert checked.problems == []
    assert 4 < checked.splits["train"].entropy_bits < 6
    few = stdlib_sources(max_bytes=1 << 20)
    assert few == sources[: len(few)]
    assert sum(source.size_bytes for source in few) <= 1 << 20
