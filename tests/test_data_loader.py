"""Windows and batches: each window once an epoch, at any world size, resumed anywhere; damage is never trained on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfe_hpc.data import loader as loading
from cfe_hpc.data.build import BuildOptions, build_from_paths
from cfe_hpc.data.loader import BatchLoader, TokenWindows, eval_batches
from cfe_hpc.errors import CheckpointMismatch, ConfigError, DataError

SEQ_LEN = 16
NUM_WINDOWS = 61
IN_FILE = {"memory_limit_bytes": 0}


def token_file(folder, ids, **options):
    """A token file whose train split holds `ids` as they are."""
    np.save(folder / "ids.npy", np.asarray(ids))
    made = BuildOptions(validation_fraction=0, max_document_tokens=1 << 30, **options)
    build_from_paths(folder / "tokens.h5", [folder / "ids.npy"], options=made)
    return folder / "tokens.h5"


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Token i is i: a window tells its own place. 61 windows and 7 tokens that fill none."""
    return token_file(tmp_path_factory.mktemp("counted"), np.arange(NUM_WINDOWS * SEQ_LEN + 8))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Five chunks of uint16: windows cross chunk borders."""
    ids = np.random.default_rng(0).integers(0, 60_000, 5 * (1 << 19) + 12_345)
    return token_file(tmp_path_factory.mktemp("large"), ids), ids


def consumed(loaders, steps):
    """Numbers of the windows that all ranks of a run took in `steps` steps, by rank within each step."""
    return [int(row[0]) // SEQ_LEN for _ in range(steps) for loader in loaders for row in loader.next_batch()]


def ranks(windows, world_size, global_batch, seed=0):
    return [
        BatchLoader(windows, global_batch=global_batch, rank=rank, world_size=world_size, seed=seed)
        for rank in range(world_size)
    ]


def test_windows_hold_the_tokens_in_place(counted):
    windows = TokenWindows(counted, seq_len=SEQ_LEN)
    assert (len(windows), windows.num_tokens, windows.vocab_size) == (NUM_WINDOWS, 984, 984)
    rows = windows.read(np.array([0, 60]))
    assert rows.dtype == np.int64
    assert rows.tolist() == [list(range(17)), list(range(960, 977))]


@pytest.mark.parametrize("options", [{}, IN_FILE], ids=["memory", "file"])
def test_uint16_windows_across_chunks(large, options):
    path, ids = large
    windows = TokenWindows(path, seq_len=1000, **options)
    assert windows.in_memory == (not options)
    border = (1 << 19) // 1000
    chosen = np.array([border, 0, len(windows) - 1, border])
    expected = [ids[window * 1000 : window * 1000 + 1001].tolist() for window in chosen]
    assert windows.read(chosen).tolist() == expected


def test_a_window_longer_than_a_chunk(large):
    path, ids = large
    windows = TokenWindows(path, seq_len=1_200_000, **IN_FILE)
    assert np.array_equal(windows.read(np.array([1]))[0], ids[1_200_000:2_400_001])


@given(
    plan=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 3), st.integers(0, 12)), min_size=1, max_size=6
    ),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_each_window_once_an_epoch_however_often_the_world_changes(counted, plan, seed):
    """Each part of the plan runs some steps at a world size and a global batch, then stops and is resumed."""
    windows = TokenWindows(counted, seq_len=SEQ_LEN)
    state, taken = None, []
    for world_size, multiple, steps in plan:
        loaders = ranks(windows, world_size, 12 * multiple, seed)
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        taken += consumed(loaders, steps)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert state["samples"] == len(taken)
    solo = BatchLoader(windows, global_batch=1, seed=seed)
    assert taken == consumed([solo], len(taken))
    for start in range(0, len(taken), NUM_WINDOWS):
        epoch = taken[start : start + NUM_WINDOWS]
        assert len(set(epoch)) == len(epoch)


@given(
    plan=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 2), st.integers(1, 8), st.integers(-1, 3)),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None, max_examples=60)
def test_only_what_is_skipped_is_left_out_at_any_world_size(counted, plan):
    """Before each part of the plan one of the batches ahead is to be skipped, if its number is not negative."""
    windows = TokenWindows(counted, seq_len=SEQ_LEN)
    solo = BatchLoader(windows, global_batch=1)
    order = consumed([solo], 6 * 8 * 8 * 5)
    state, taken, skipped = None, [], set()
    for world_size, multiple, steps, ahead in plan:
        loaders = ranks(windows, world_size, 4 * multiple)
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
            if ahead >= 0:
                window = loader.window_ahead(ahead)
                for _ in range(2):  # the second time changes nothing
                    loader.skip_window(*window)
        if ahead >= 0:
            skipped |= set(range(*window))
        taken += consumed(loaders, steps)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    kept = [window for sample, window in enumerate(order) if sample not in skipped]
    assert taken == kept[: len(taken)]


@pytest.mark.parametrize("options", [{}, IN_FILE], ids=["memory", "file"])
def test_a_window_ahead_is_the_batch_that_would_come(counted, options):
    loader = BatchLoader(TokenWindows(counted, seq_len=SEQ_LEN, **options), global_batch=8)
    loader.next_batch()
    batches = [consumed([loader], 1) for _ in range(9)]  # over the end of the epoch
    loader.load_state_dict({**loader.state_dict(), "samples": 8})
    assert loader.window_ahead(6) == (56, 64)
    loader.skip_window(*loader.window_ahead(6))
    assert loader.window_ahead(6) == (64, 72)
    assert loader.window_ahead(5) == (48, 56)
    assert [consumed([loader], 1) for _ in range(8)] == [*batches[:6], *batches[7:]]
    assert loader.epoch == 1


def test_a_skip_in_the_middle_of_a_batch_is_filled_up(counted):
    loader = BatchLoader(TokenWindows(counted, seq_len=SEQ_LEN), global_batch=8)
    order = consumed([loader], 7)
    loader.load_state_dict({**loader.state_dict(), "samples": 0, "skipped": [[3, 5]]})
    assert loader.window_ahead(0) == (0, 10)
    assert consumed([loader], 2) == [*order[:3], *order[5:18]]


def test_a_position_of_an_earlier_version_skips_nothing(counted):
    loader = BatchLoader(TokenWindows(counted, seq_len=SEQ_LEN), global_batch=8)
    state = loader.state_dict()
    loader.skip_window(0, 8)
    del state["skipped"]
    loader.load_state_dict(state)
    assert loader.window_ahead(0) == (0, 8)


def test_a_batch_spans_two_epochs_without_loss(counted):
    loaders = ranks(TokenWindows(counted, seq_len=SEQ_LEN), 2, 4)
    taken = consumed(loaders, 61)  # 244 windows: four epochs
    for start in range(0, 244, NUM_WINDOWS):
        assert sorted(taken[start : start + NUM_WINDOWS]) == list(range(NUM_WINDOWS))
    assert loaders[0].epoch == 4
    assert taken[:NUM_WINDOWS] != taken[NUM_WINDOWS : 2 * NUM_WINDOWS]


@pytest.mark.parametrize("options", [{}, IN_FILE], ids=["memory", "file"])
def test_going_back_gives_the_same_batches(counted, options):
    loader = BatchLoader(TokenWindows(counted, seq_len=SEQ_LEN, **options), global_batch=8)
    loader.next_batch()
    state = loader.state_dict()
    first = [loader.next_batch() for _ in range(10)]
    loader.load_state_dict(state)
    again = [loader.next_batch() for _ in range(10)]
    assert np.array_equal(first, again)


def test_order_across_the_blocks_that_are_computed_at_once(counted, monkeypatch):
    windows = TokenWindows(counted, seq_len=SEQ_LEN)
    whole = consumed([BatchLoader(windows, global_batch=40)], 4)
    monkeypatch.setattr(loading, "_ORDER_BLOCK", 7)
    assert consumed([BatchLoader(windows, global_batch=40)], 4) == whole


def test_same_batches_in_another_process(counted):
    program = (
        "import hashlib, sys\n"
        "from cfe_hpc.data.loader import BatchLoader, TokenWindows\n"
        "loader = BatchLoader(TokenWindows(sys.argv[1], seq_len=16), global_batch=6, rank=1, world_size=2, seed=9)\n"
        "print(hashlib.sha256(b''.join(loader.next_batch().tobytes() for _ in range(30))).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(counted)], capture_output=True, text=True, timeout=60, check=True
    )
    loader = ranks(TokenWindows(counted, seq_len=SEQ_LEN), 2, 6, seed=9)[1]
    here = hashlib.sha256(b"".join(loader.next_batch().tobytes() for _ in range(30))).hexdigest()
    assert done.stdout.strip() == here


@pytest.mark.parametrize("options", [{}, IN_FILE], ids=["memory", "file"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_read_before_and_after_a_fork(counted, options):
    windows = TokenWindows(counted, seq_len=SEQ_LEN, **options)
    assert windows.read(np.array([1]))[0, 0] == SEQ_LEN
    child = os.fork()
    if child == 0:
        os._exit(0 if windows.read(np.array([2]))[0, 0] == 2 * SEQ_LEN else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert windows.read(np.array([3]))[0, 0] == 3 * SEQ_LEN


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed was 0, is 1"), ({"seq_len": 8}, "seq_len was 16, is 8"), ({"ids": 1}, "tokens_sha256 was")],
)
def test_a_position_of_other_data_is_refused(counted, tmp_path, change, named):
    state = BatchLoader(TokenWindows(counted, seq_len=SEQ_LEN), global_batch=4).state_dict()
    path = token_file(tmp_path, np.arange(984)[::-1]) if "ids" in change else counted
    windows = TokenWindows(path, seq_len=change.get("seq_len", SEQ_LEN))
    loader = BatchLoader(windows, global_batch=4, seed=change.get("seed", 0))
    with pytest.raises(CheckpointMismatch, match=named) as caught:
        loader.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert loader.samples == 0


def test_too_little_data_is_refused(counted):
    with pytest.raises(DataError, match=r"train has 61 windows of 16 tokens, fewer than one global batch \(62\)"):
        BatchLoader(TokenWindows(counted, seq_len=SEQ_LEN), global_batch=62)
    with pytest.raises(DataError, match="train has 984 tokens, fewer than one window of 985"):
        TokenWindows(counted, seq_len=984)
    assert len(TokenWindows(counted, seq_len=983)) == 1
    with pytest.raises(DataError, match="validation has 0 tokens"):
        TokenWindows(counted, "validation", seq_len=1)


def test_wrong_settings_are_refused(counted):
    windows = TokenWindows(counted, seq_len=SEQ_LEN)
    with pytest.raises(ConfigError, match=r"cannot be shared \(10\); make it a multiple of the world size, 4"):
        BatchLoader(windows, global_batch=10, world_size=4)
    with pytest.raises(DataError, match=r"no such split \(test\); splits are train, validation"):
        TokenWindows(counted, "test", seq_len=SEQ_LEN)
    with pytest.raises(DataError, match="seq_len must be at least 1"):
        TokenWindows(counted, seq_len=0)


@pytest.mark.parametrize("options", [{}, IN_FILE], ids=["memory", "file"])
def test_damaged_chunks_are_never_handed_out(large, tmp_path, options):
    path, ids = large
    with h5py.File(path, "r") as file:
        chunk = file["train/tokens"].id.get_chunk_info_by_coord((3 << 19,))
    damaged = bytearray(path.read_bytes())
    damaged[chunk.byte_offset + 777] ^= 1
    (tmp_path / "damaged.h5").write_bytes(damaged)
    windows = TokenWindows(tmp_path / "damaged.h5", seq_len=1000, **options)
    with pytest.raises(DataError, match="train/tokens is damaged between tokens"):
        windows.read(np.array([(3 << 19) // 1000 + 1]))
    if options:
        assert windows.read(np.array([0]))[0].tolist() == ids[:1001].tolist()


def test_a_file_that_the_users_code_has_open_too(tmp_path):
    # A file of its own: HDF5 refuses the lock below while a window of another test, not yet collected, holds the file.
    path = token_file(tmp_path, np.arange(500))
    with h5py.File(path, "r"):
        assert TokenWindows(path, seq_len=SEQ_LEN, **IN_FILE).read(np.array([1]))[0, 0] == SEQ_LEN


@pytest.mark.parametrize("options", [{}, IN_FILE], ids=["memory", "file"])
def test_a_file_replaced_before_the_first_read_is_noticed(tmp_path, options):
    path = token_file(tmp_path, np.arange(500))
    windows = TokenWindows(path, seq_len=SEQ_LEN, **options)
    path.unlink()
    token_file(tmp_path, np.arange(500) + 1)
    with pytest.raises(DataError, match="was replaced by another token file"):
        windows.read(np.array([0]))


@pytest.mark.parametrize("limit", [None, 1, 10, 60, 1000])
@pytest.mark.parametrize(("world_size", "batch"), [(1, 1), (1, 7), (2, 3), (4, 8), (5, 100)])
def test_evaluation_sees_the_same_windows_at_any_world_size(counted, world_size, batch, limit):
    windows = TokenWindows(counted, seq_len=SEQ_LEN)
    by_rank = [
        list(eval_batches(windows, batch=batch, rank=rank, world_size=world_size, limit=limit))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    counted_windows = []
    for batches in by_rank:
        for one in batches:
            assert one.tokens.shape == (batch, SEQ_LEN + 1)
            assert one.weights.shape == (batch,)
            counted_windows += (one.tokens[one.weights == 1][:, 0] // SEQ_LEN).tolist()
    count = min(limit or NUM_WINDOWS, NUM_WINDOWS)
    assert sorted(counted_windows) == [place * NUM_WINDOWS // count for place in range(count)]


def test_a_batch_becomes_a_tensor_without_a_copy(counted):
    torch = pytest.importorskip("torch")
    batch = BatchLoader(TokenWindows(counted, seq_len=SEQ_LEN), global_batch=4).next_batch()
    tensor = torch.from_numpy(batch)
    assert tensor.dtype == torch.int64
    assert tensor.data_ptr() == batch.ctypes.data
