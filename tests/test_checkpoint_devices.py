"""What lies on a device goes straight into staging memory, beside training: the order of things, on a fake device."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Bytes, Cuda
from test_checkpoint_async import read_back, saving, wait_for
from test_checkpoint_plans import told
from test_checkpoint_tracked import Training, bits

from cfe_hpc.checkpoints import store
from cfe_hpc.checkpoints.beside.workers import Worker
from cfe_hpc.checkpoints.beside.writer import _Writer
from cfe_hpc.checkpoints.io import staging
from cfe_hpc.checkpoints.io.memory import allocate
from cfe_hpc.checkpoints.io.staging import Arena
from cfe_hpc.checkpoints.protocols import OnDevice, Piece, SoloGroup
from cfe_hpc.checkpoints.state import tensors
from cfe_hpc.checkpoints.state.capturing import Capturing, capture
from cfe_hpc.checkpoints.state.tensors import DeviceBytes, tensor_bytes, tensor_data
from cfe_hpc.checkpoints.store import Content
from cfe_hpc.checkpoints.tracked import restore
from cfe_hpc.devices.cuda_copies import CudaCopies
from cfe_hpc.errors import CheckpointError

SIZE = 3 << 20
BEFORE = [b"\1" * SIZE, b"\1" * 5000]


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


def copies(cuda: Cuda) -> CudaCopies:
    return CudaCopies(cuda, "cpu")


def filled(value: int) -> list[torch.Tensor]:
    return [torch.full((size,), value, dtype=torch.uint8) for size in (SIZE, 5000)]


def content(data: list[Any], step: int = 1) -> Content:
    """A steady piece and one that is not; `data` has what is where."""
    names = zip("wb", data, (True, False), strict=True)
    pieces = [
        Piece(name=name, dtype="uint8", shape=(each.nbytes,), start=0, data=each, steady=steady)
        for name, each, steady in names
    ]
    return Content(pieces=pieces, state=step)


def test_with_overlap_copies_follow_the_step_before_and_end_before_the_next(tmp_path: Path, cuda: Cuda) -> None:
    w, _ = filled(0)
    beside = copies(cuda)
    forward = threading.Event()
    with saving(tmp_path, SoloGroup(), overlap=True, copies=beside) as saves:
        data = [Bytes(cuda, w), memoryview(bytearray(BEFORE[1]))]
        saves.reserve(content(data))
        cuda.compute.do(forward.wait)
        cuda.compute.do(lambda: w.fill_(1))  # what the step before has left the device to do
        saves.begin(content(data), step=1)  # it does not wait for that
        wait_for(lambda: beside._streams, "the copies were not begun")
        time.sleep(0.01)
        assert cuda.log == ["pin"]
        cuda.log.append("begun")
        forward.set()
        saves.settle()
        cuda.log.append("settled")
        w.fill_(9)
        assert saves.finish() is not None
    assert cuda.log == ["pin", "begun", "copy", "settled", "unpin"]
    assert read_back(tmp_path, 1) == BEFORE


@pytest.mark.parametrize("overlap", [False, True])
def test_what_may_change_at_once_is_there_when_begin_returns(tmp_path: Path, cuda: Cuda, overlap: bool) -> None:
    w, b = filled(0)
    with saving(tmp_path, SoloGroup(), overlap=overlap, copies=copies(cuda)) as saves:
        data, cuda.copy_s = [Bytes(cuda, w), Bytes(cuda, b)], 0.03
        saves.reserve(content(data))
        cuda.compute.do(lambda: time.sleep(0.03))
        cuda.compute.do(lambda: (w.fill_(1), b.fill_(1)))
        saves.begin(content(data), step=1)
        cuda.compute.do(lambda: b.fill_(9))
        if overlap:
            saves.settle()
        cuda.compute.do(lambda: w.fill_(9))
        assert saves.finish() is not None
    assert cuda.log == ["pin", "copy", "copy", "unpin"]
    assert read_back(tmp_path, 1) == BEFORE


def test_memory_that_grows_is_pinned_anew_and_let_go_before_it_is_unmapped(cuda: Cuda) -> None:
    arena = Arena()
    arena.copies = copies(cuda)
    arena.reserve(1 << 20)
    arena.reserve(1000)
    assert (cuda.log, len(cuda.pinned)) == (["pin"], 1)
    arena.reserve(5 << 20)
    assert (cuda.log, arena.is_pinned) == (["pin", "unpin", "pin"], True)
    arena.close()  # that all of it was still mapped the fake has looked at
    assert (cuda.log[3:], cuda.pinned, arena.is_pinned) == (["unpin"], set(), False)


def test_memory_is_not_let_go_while_a_copy_is_under_way(cuda: Cuda) -> None:
    arena, w, gate = Arena(), filled(1)[0], threading.Event()
    cuda.copy_s = 0.05
    arena.copies = beside = copies(cuda)
    arena.reserve(SIZE)
    under_way = threading.Thread(
        target=lambda: list(beside.fetch([(Bytes(cuda, w), out)], beside.boundary(["dev"]))), daemon=True
    )
    cuda.compute.do(gate.wait)
    out = arena.view(SIZE)
    under_way.start()
    wait_for(lambda: beside._streams, "the copy was not begun")
    grows = threading.Thread(target=arena.reserve, args=(2 * SIZE,), daemon=True)
    grows.start()
    gate.set()
    grows.join()
    under_way.join()
    assert cuda.log == ["pin", "copy", "unpin", "pin"]
    assert bytes(arena.view(SIZE)) == BEFORE[0]
    arena.close()


def test_memory_that_cannot_be_pinned_serves_and_is_told_once(
    tmp_path: Path, cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuses = True
    with saving(tmp_path, SoloGroup(), overlap=True, copies=copies(cuda)) as saves:
        for step in (1, 2):
            _, b = filled(1)
            big = torch.ones(SIZE * step, dtype=torch.uint8)
            saves.begin(content([Bytes(cuda, big), Bytes(cuda, b)], step), step=step)
            saves.settle()
            assert saves.finish() is not None
            assert read_back(tmp_path, step) == [b"\1" * SIZE * step, BEFORE[1]]
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    told_once = "staging memory cannot be pinned (cudaHostRegister: error 1): copies from the device take longer"
    assert warnings == [told_once]
    assert cuda.log == ["copy"] * 4


class Torn(Bytes):
    """It cannot be had."""

    def flat(self) -> torch.Tensor:
        raise RuntimeError("device lost")


def test_when_a_copy_fails_those_before_it_are_done(cuda: Cuda) -> None:
    w, b = filled(1)
    beside, cuda.copy_s = copies(cuda), 0.05
    outs = [memoryview(bytearray(len(each))) for each in (w, b)]
    with pytest.raises(RuntimeError, match="device lost"):
        list(beside.fetch([(Bytes(cuda, w), outs[0]), (Torn(cuda, b), outs[1])], beside.boundary(["dev"])))
    assert (cuda.log, bytes(outs[0])) == (["copy"], BEFORE[0])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_copy_that_fails_fails_the_save(tmp_path: Path, cuda: Cuda, overlap: bool) -> None:
    w, b = filled(1)
    pieces = [
        Piece(name=name, dtype="uint8", shape=(each.nbytes,), start=0, data=each, steady=True)
        for name, each in (("w", Bytes(cuda, w)), ("b", Torn(cuda, b)))
    ]
    with saving(tmp_path, SoloGroup(), overlap=overlap, copies=copies(cuda)) as saves:
        saves.begin(Content(pieces=pieces, state=1), step=1)
        with pytest.raises(CheckpointError, match="device lost"):
            saves.finish()


def test_without_such_copies_all_is_copied_while_training_waits(tmp_path: Path, cuda: Cuda) -> None:
    w, b = filled(0)
    with saving(tmp_path, SoloGroup(), overlap=True) as saves:
        cuda.compute.do(lambda: (w.fill_(1), b.fill_(1)))
        saves.begin(content([Bytes(cuda, w), Bytes(cuda, b)]), step=1)
        w.fill_(9)
        b.fill_(9)
        assert saves.finish() is not None
    assert read_back(tmp_path, 1) == BEFORE


@pytest.mark.parametrize(("pinned", "huge"), [(True, False), (False, True), (False, False)])
def test_pages_that_are_pinned_or_huge_stay_where_they_are(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, pinned: bool, huge: bool
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(staging, "allocate", lambda *words: (allocate(*words), huge)[1])
    monkeypatch.setattr(Worker, "ask", lambda self, request: asked.append(request))
    worker, gathered = Worker(), list[memoryview]()
    worker.arena.copies = copies(cuda) if pinned else None
    worker.arena.reserve(1 << 20)
    worker.attach()

    class Pages:
        gather = staticmethod(gathered.append)

    _Writer(Arena(worker.arena.fd), None, None, Pages(), None).attach(*asked)  # type: ignore[arg-type]
    assert bool(gathered) is not (pinned or huge)
    worker.close()


VIEWS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.rand(7, 5),
    lambda: torch.rand(7, 5).t(),
    lambda: torch.rand(6, 4)[::2],
    lambda: torch.rand(5, dtype=torch.complex64).conj(),
    lambda: torch.rand(40).to(torch.bfloat16),
    lambda: torch.rand(40) > 0.5,
    lambda: torch.tensor(3.0),
]


@pytest.mark.parametrize("made", VIEWS)
@pytest.mark.parametrize(("start", "count"), [(0, None), (0, 1), (3, 2)])
def test_bytes_on_a_device_are_those_of_the_tensor(
    made: Callable[[], torch.Tensor], start: int, count: int | None
) -> None:
    tensor = made()
    if start + (count or 0) > tensor.numel():
        return
    there = DeviceBytes(tensor, start, tensor.numel() - start if count is None else count)
    expected = bytes(tensor_bytes(tensor, start, count))
    out = memoryview(bytearray(there.nbytes))
    there.copy_to(out)
    assert (bytes(out), bytes(there.on_host()), there.nbytes) == (expected, expected, len(expected))
    whole = DeviceBytes(tensor, 0, tensor.numel()).flat()
    assert (whole.data_ptr() == tensor.data_ptr()) is (tensor.is_contiguous() and not tensor.is_conj())


def read(content: Content) -> Any:
    """A content's bytes and all that is told of them, wherever they are."""

    def here(each: Piece) -> Piece:
        data = each.data if isinstance(each.data, memoryview) else each.data.on_host()
        return Piece(
            name=each.name, dtype=each.dtype, shape=each.shape, start=each.start, data=data, steady=each.steady
        )

    return told(Content(pieces=list(map(here, content.pieces)), own=list(map(here, content.own)), state=content.state))


def test_a_state_on_a_device_is_captured_without_a_copy_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that say that they are on a device, as far as checkpoints ask."""
    training = Training()
    training.step()
    expected = read(capture(training.objects(), group=SoloGroup()))
    monkeypatch.setattr(tensors, "_on_device", lambda value: True)
    capturing = Capturing(training.objects(), group=SoloGroup())
    first = capturing.take()
    assert {type(each.data) for each in first.pieces if each.name.startswith(("model", "optimizer"))} == {DeviceBytes}
    assert read(first) == expected
    assert capturing.take().form is first.form and first.unchanged()
    training.step()
    assert not first.unchanged()
    second = capturing.take()
    assert second.form is first.form and read(second) != expected
    store.save(tmp_path, second, step=2, attempt=0, run_id="run-1", group=SoloGroup())
    monkeypatch.undo()
    other = Training(seed=1)
    opened = store.newest(tmp_path, run_id="run-1", attempt=1, group=SoloGroup())
    assert opened is not None
    restore(opened, other.objects(), group=SoloGroup())
    assert bits(other.model) == bits(training.model)


def test_what_is_on_the_host_or_empty_is_plain_memory() -> None:
    data = tensor_data(torch.ones(3))
    assert isinstance(data, memoryview)
    nothing: memoryview | OnDevice = tensor_data(torch.ones(0, device="meta"))
    assert isinstance(nothing, memoryview)
