"""The format: any interval from any shards, and what a reader needs that knows only its description."""

from __future__ import annotations

import itertools
import json
import math
import random
import tempfile
from pathlib import Path

import crc32c
import pytest
from checkpoint_groups import all_good, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc.checkpoints import layout
from cfe_hpc.checkpoints.io.staging import Source
from cfe_hpc.checkpoints.layout import BLOCK_BYTES, CHUNK_BYTES, Placement, divide, place
from cfe_hpc.checkpoints.protocols import Piece, SoloGroup
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.store import Content, newest, save
from cfe_hpc.errors import CheckpointError, CheckpointMismatch

TENSORS = st.lists(
    st.tuples(
        st.sampled_from(["uint8", "bfloat16", "float32", "float64"]),
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=5,
)


def content_of(index: int, dtype: str, shape: tuple[int, ...]) -> bytes:
    return random.Random(index).randbytes(math.prod(shape) * layout.DTYPE_BYTES[dtype])


@given(TENSORS, st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_any_interval_is_assembled_from_any_shards(tensors, writers: int, readers: int, rng: random.Random) -> None:
    contents = [content_of(index, *tensor) for index, tensor in enumerate(tensors)]
    pieces: list[list[Piece]] = [[] for _ in range(writers)]
    for index, ((dtype, shape), whole) in enumerate(zip(tensors, contents, strict=True)):
        item, total = layout.DTYPE_BYTES[dtype], math.prod(shape)
        cuts = sorted({0, total, *(rng.randint(0, total) for _ in range(4))}) if total else [0, 0]
        for low, high in itertools.pairwise(cuts):
            low = max(0, low - rng.randint(0, 5))  # pieces overlap
            for rank in rng.sample(range(writers), rng.randint(1, writers)):  # and are replicated
                data = memoryview(whole[low * item : high * item])
                pieces[rank].append(Piece(name=f"t{index}", dtype=dtype, shape=shape, start=low, data=data))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        all_good(
            run_ranks(
                writers,
                lambda group: save(
                    root, Content(pieces=pieces[group.rank]), step=1, attempt=0, run_id="r", group=group
                ),
            )
        )
        reader = Opened.at(root / "step-000000001").reader
        for index, ((dtype, shape), whole) in enumerate(zip(tensors, contents, strict=True)):
            item, total = layout.DTYPE_BYTES[dtype], math.prod(shape)
            assert reader.describe(f"t{index}") == (dtype, shape)
            back = bytearray()
            for part in range(readers):
                low, high = total * part // readers, total * (part + 1) // readers
                out = bytearray((high - low) * item)
                reader.read_into(f"t{index}", low, memoryview(out))
                back += out
            assert back == whole


@given(TENSORS, st.integers(1, 7))
@settings(deadline=None)
def test_a_division_covers_each_element_once_and_is_balanced(tensors, parts: int) -> None:
    tensors = [*tensors, ("float32", (3000,)), ("bfloat16", (70, 100))]
    shares = [divide(tensors, part, parts) for part in range(parts)]
    seen: list[list[tuple[int, int]]] = [[] for _ in tensors]
    for share in shares:
        for index, start, count in share:
            seen[index].append((start, start + count))
    for (_, shape), intervals in zip(tensors, seen, strict=True):
        at = 0
        for low, high in sorted(intervals):
            assert low == at and (high > low or math.prod(shape) == 0)
            at = high
        assert at == math.prod(shape) and intervals
    sizes = [sum(count * layout.DTYPE_BYTES[tensors[index][0]] for index, _, count in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2 * BLOCK_BYTES


@given(st.lists(st.integers(0, 9000), max_size=6), st.integers(0, 40_000), st.integers(0, 20_000))
def test_staging_copies_any_range_of_the_file(sizes: list[int], start: int, length: int) -> None:
    contents = [random.Random(size).randbytes(size) for size in sizes]
    pieces = [
        Piece(name=str(i), dtype="uint8", shape=(len(c),), start=0, data=memoryview(c)) for i, c in enumerate(contents)
    ]
    placement: Placement = place(pieces)
    head = b"h" * BLOCK_BYTES
    expected = bytearray(placement.size_bytes)
    expected[:BLOCK_BYTES] = head
    for extent, content in zip(placement.extents, contents, strict=True):
        assert extent.offset % BLOCK_BYTES == 0
        expected[extent.offset : extent.offset + len(content)] = content
    out = bytearray(b"?" * max(0, min(length, placement.size_bytes - start)))
    source = Source(head, placement, [piece.data for piece in pieces])
    source.chunk(start, memoryview(out))
    assert out == expected[start : start + len(out)]
    whole = bytearray(b"?" * placement.size_bytes)
    source.lay_out(memoryview(whole))
    ends = list(source.copy(range(len(pieces)), memoryview(whole)))
    assert whole == expected and ends == sorted(ends)


def read_by_description(folder: Path, name: str) -> bytes:
    """A tensor by docs/checkpoint-format.md alone: nothing of cfe_hpc is used here."""

    def sealed(path: Path) -> dict:
        content = path.read_bytes()
        head, tail = content[:-23], content[-23:]
        assert tail == b'"crc32c": "%08x"\n}\n' % crc32c.crc32c(head), path
        return json.loads(content)

    manifest = sealed(folder / "manifest.json")
    assert (manifest["format"], manifest["version"]) == ("cfe_hpc checkpoint manifest", 1)
    assert folder.name == f"step-{manifest['step']:09d}"
    identity = {key: manifest[key] for key in ("run_id", "step", "attempt", "world_size", "token")}
    whole: dict[int, bytes] = {}
    for rank in range(manifest["world_size"]):
        index_path, data_path = folder / f"shard-{rank:05d}.json", folder / f"shard-{rank:05d}.bin"
        index, data = sealed(index_path), data_path.read_bytes()
        facts = manifest["files"]
        assert facts[index_path.name]["crc32c"] == f"{crc32c.crc32c(index_path.read_bytes()):08x}"
        assert facts[data_path.name]["size_bytes"] == index["data_bytes"] == len(data)
        words = b"".join(int(word, 16).to_bytes(4, "little") for word in index["chunks"])
        assert facts[data_path.name]["crc32c"] == f"{crc32c.crc32c(words):08x}"
        for number, word in enumerate(index["chunks"]):
            assert crc32c.crc32c(data[number << 23 : (number + 1) << 23]) == int(word, 16)
        magic, line = data[:4096].rstrip(b"\0").splitlines()
        assert magic == b"cfe_hpc shard data"
        assert json.loads(line) == {"version": 1, **identity, "rank": rank}
        assert {key: index[key] for key in (*identity, "rank")} == {**identity, "rank": rank}
        for extent in index["shared"]:
            if extent["name"] == name:
                size = {"bfloat16": 2, "float32": 4, "int64": 8}[extent["dtype"]]
                for element in range(extent["count"]):
                    at = extent["offset"] + element * size
                    whole[extent["start"] + element] = data[at : at + size]
    return b"".join(whole[element] for element in sorted(whole))


def test_the_description_of_the_format_is_enough_to_read_it(tmp_path: Path) -> None:
    whole = random.Random(1).randbytes(4 * 9000)

    def work(group):
        share = divide([("float32", (90, 100))], group.rank, group.size)
        pieces = [
            Piece(
                name="w", dtype="float32", shape=(90, 100), start=low, data=memoryview(whole)[low * 4 : (low + n) * 4]
            )
            for _, low, n in share
        ]
        return save(tmp_path, Content(pieces=pieces), step=12, attempt=3, run_id="r", group=group)

    paths = {info.path for info in all_good(run_ranks(3, work))}
    assert read_by_description(paths.pop(), "w") == whole and not paths


def test_data_of_many_chunks_returns_and_sums_are_per_chunk(tmp_path: Path) -> None:
    whole = random.Random(2).randbytes(2 * CHUNK_BYTES + 12_345)
    piece = Piece(name="w", dtype="uint8", shape=(len(whole),), start=0, data=memoryview(whole))
    save(tmp_path, Content(pieces=[piece]), step=1, attempt=0, run_id="r", group=SoloGroup())
    opened = newest(tmp_path, run_id="r", attempt=0, group=SoloGroup())
    assert opened is not None
    for low, high in [(0, len(whole)), (CHUNK_BYTES - 7000, CHUNK_BYTES + 5), (len(whole) - 1, len(whole)), (9, 9)]:
        out = bytearray(high - low)
        opened.reader.read_into("w", low, memoryview(out))
        assert out == whole[low:high]


@pytest.mark.parametrize(
    ("name", "start", "size", "words"),
    [("x", 0, 4, "no tensor x"), ("w", 0, 404, "has 100 elements"), ("w", 99, 8, "100"), ("w", 0, 3, "100")],
)
def test_what_is_not_there_cannot_be_read(tmp_path: Path, name: str, start: int, size: int, words: str) -> None:
    piece = Piece(name="w", dtype="float32", shape=(100,), start=0, data=memoryview(bytes(400)))
    save(tmp_path, Content(pieces=[piece]), step=1, attempt=0, run_id="r", group=SoloGroup())
    with pytest.raises(CheckpointMismatch, match=words):
        Opened.at(tmp_path / "step-000000001").reader.read_into(name, start, memoryview(bytearray(size)))


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([(0, 3, "float32", (10,)), (4, 6, "float32", (10,))], "tensor w: no shard holds element 3"),
        ([(0, 9, "float32", (10,))], "no shard holds element 9"),
        ([(0, 10, "float32", (10,)), (0, 10, "float32", (2, 5))], "shards disagree about tensor w"),
        ([(0, 11, "float32", (10,))], "are no interval of float32"),
        ([(0, 10, "quint8", (10,))], "dtype quint8 cannot be stored"),
    ],
)
def test_pieces_that_do_not_make_their_tensors_are_refused_at_the_save(tmp_path: Path, pieces, words: str) -> None:
    made = [
        Piece(name="w", dtype=dtype, shape=shape, start=start, data=memoryview(bytes(4 * count)))
        for start, count, dtype, shape in pieces
    ]
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, Content(pieces=made), step=1, attempt=0, run_id="r", group=SoloGroup())
    assert list(tmp_path.iterdir()) == []
