"""Real ranks for tests of training: fresh processes in one gloo group, and checkpoints through the real store.

Each rank is a process of its own that starts with torch and deepspeed imported: importing them takes seconds of a core,
so one server process does that once and ranks are forked from it, before it has any thread or group.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import multiprocessing.forkserver
import os
import queue
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.checkpoints.store import Content, newest, save


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """`function(rank, *args)` in a fresh process for each rank; what each returned, by rank."""
    context = _context()
    answers: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, answers, function, args))
        for rank in range(world_size)
    ]
    results: dict[int, Any] = {}
    try:
        for process in processes:
            process.start()
        while len(results) < world_size:
            rank, good, value = answers.get(timeout=timeout_s)
            assert good, f"rank {rank}:\n{value}"
            results[rank] = value
    except queue.Empty:
        raise AssertionError(f"ranks {sorted(set(range(world_size)) - set(results))} gave no answer") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Beside the two themselves, what making a first optimizer or engine imports: most of the time by far.
    late = ["torch._dynamo", "torch.distributed.tensor", "deepspeed.runtime.zero.muon.original_muon"]
    context.set_forkserver_preload(["torch", "deepspeed", *late])
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed looks at it on import, in the server
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before
    return context


def _rank_main(rank: int, world_size: int, port: int, answers: Any, function: Any, args: Sequence[Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    try:
        import torch

        gc.freeze()  # deepspeed collects garbage while it makes an engine: a second each over all that is imported
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        answers.put((rank, True, function(rank, *args)))
        torch.distributed.barrier()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))


def gloo_group() -> Group:
    """`checkpoints.protocols.Group` over the default process group."""
    from cfe_hpc.checkpoints.state.torch_group import TorchGroup

    return TorchGroup(None)


def save_sharded(root: Path, sharded: Any, *, step: int) -> None:
    """One checkpoint with one Sharded object in it."""
    pieces, tree = sharded.checkpoint_state()
    content = Content(pieces=list(pieces), state=tree, layout=sharded.checkpoint_layout())
    save(root, content, step=step, attempt=0, run_id="test", group=gloo_group())


def load_sharded(root: Path, sharded: Any) -> int:
    """Take the newest checkpoint back; its step."""
    group = gloo_group()
    opened = newest(root, run_id="test", attempt=1, group=group)
    assert opened is not None
    saved_ranks = opened.manifest.identity.world_size
    tree = opened.state(group.rank if group.size == saved_ranks else 0)
    sharded.load_checkpoint_state(opened.reader, tree)
    return opened.step


def digest(named_tensors: Any) -> str:
    """SHA-256 over names and bytes of (name, tensor) in the order given."""
    total = hashlib.sha256()
    for name, tensor in named_tensors:
        total.update(name.encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()
