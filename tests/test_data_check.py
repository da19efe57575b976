"""Damage anywhere in a token file is found and placed."""

from __future__ import annotations

import dataclasses
import random

import h5py
import numpy as np
import pytest

from cfe_hpc.data.build import BuildOptions, build_from_paths
from cfe_hpc.data.check import check


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    for number in range(12):
        text = "".join(map(chr, rng.integers(32, 127, 120_000)))
        (folder / f"{number}.txt").write_text(text)
    path = folder / "good.h5"
    build_from_paths(path, [folder], options=BuildOptions(validation_fraction=0.2))
    return path


def test_a_good_file_and_its_statistics(good):
    report = check(good)
    assert report.problems == []
    assert sum(split.share for split in report.splits.values()) == pytest.approx(1)
    for split in report.splits.values():
        assert split.vocab_used == 96  # 95 printable characters and the separator
        assert split.entropy_bits == pytest.approx(np.log2(95), abs=0.01)
    assert report.as_json()["ok"] is True


def test_any_flipped_bit_in_the_tokens_is_found_and_placed(good, tmp_path):
    raw = good.read_bytes()
    with h5py.File(good, "r") as file:
        chunks = [
            (split, file[split]["tokens"].id.get_chunk_info(index))
            for split in ("train", "validation")
            for index in range(file[split]["tokens"].id.get_num_chunks())
        ]
    rng = random.Random(0)
    for _ in range(25):
        split, chunk = rng.choice(chunks)
        place = chunk.byte_offset + rng.randrange(chunk.size)
        damaged = bytearray(raw)
        damaged[place] ^= 1 << rng.randrange(8)
        path = tmp_path / "damaged.h5"
        path.write_bytes(damaged)
        problems = check(path).problems
        assert len(problems) == 1
        first, last = chunk.byte_offset, chunk.byte_offset + chunk.size - 1
        assert f"{path}: {split}/tokens: damaged in tokens {chunk.chunk_offset[0]} to " in problems[0]
        assert f"(bytes {first} to {last} of the file); build the file again" in problems[0]


def test_any_flipped_bit_elsewhere_is_found_or_means_nothing(good, tmp_path):
    raw = good.read_bytes()
    facts = check(good)
    with h5py.File(good, "r") as file:
        end_of_headers = min(
            file[split]["tokens"].id.get_chunk_info(0).byte_offset for split in ("train", "validation")
        )
    rng = random.Random(1)
    path = tmp_path / "damaged.h5"
    found = 0
    for place in [*range(12), *rng.sample(range(12, min(end_of_headers, 8192)), 60)]:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        report = check(path)
        found += bool(report.problems)
        assert report.problems or report == dataclasses.replace(facts, path=str(path))
    assert found > 20


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_found(good, tmp_path, share):
    path = tmp_path / "short.h5"
    path.write_bytes(good.read_bytes()[: int(good.stat().st_size * share)])
    (problem,) = check(path).problems
    assert problem.startswith(f"{path}: not a whole HDF5 file")


def tamper(good, tmp_path, change):
    """Change a copy by HDF5 itself, so that all of HDF5's own checksums are right."""
    path = tmp_path / "tampered.h5"
    path.write_bytes(good.read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    return check(path).problems


def set_value(name, index, value):
    def change(file):
        file[name][index] = value

    return change


def set_attribute(group, name, value):
    def change(file):
        file[group].attrs[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("train/tokens", 5, 65), "train/tokens: differ from their SHA-256"),
        (set_value("train/tokens", 5, 0), "train/documents: documents do not end at the separators"),
        (set_value("train/documents", 1, 7), "train/documents: documents do not end at the separators"),
        (set_value("train/documents", 1, 0), "train/documents: the document index does not fit the tokens"),
        (set_value("train/sources", 0, 99), "sources: the list does not fit the document index"),
        (set_value("sources", 0, ord("x")), "sources: the list is damaged"),
        (set_attribute("/", "vocab_size", 100), "hold tokens beyond the vocabulary of 100"),
        (set_attribute("train", "tokens", 3), "train/tokens is not laid out as the header states"),
        (set_attribute("/", "format_version", 2), "token format version 2, this cfe_hpc reads 1"),
        (set_attribute("/", "format", np.bytes_("other")), "an HDF5 file, but not a token file of cfe_hpc"),
        (lambda file: file.pop("validation"), "header is damaged"),
    ],
)
def test_contents_that_do_not_agree_are_found(good, tmp_path, change, message):
    problems = tamper(good, tmp_path, change)
    assert any(message in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)
