"""torch.save, safetensors, and torch's distributed checkpoints: synchronous, and each asynchronous configuration."""

from __future__ import annotations

import functools
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from bench_checkpoint.ways import Way
from cfe_hpc.files import fsync_file

# Told once by torch where there is no accelerator, and for every one of DCP's gathers of object lists.
warnings.filterwarnings("ignore", module="torch")


class TorchSave(Way):
    """torch.save of each rank's tensors, then fsync."""

    def save(self, folder: Path) -> None:
        path = folder / f"rank-{self.place.rank}.pt"
        torch.save(self.state.locals, path)
        self.returned()
        fsync_file(path)

    def load(self, folder: Path) -> None:
        found = torch.load(folder / f"rank-{self.place.rank}.pt", weights_only=True)
        for name, local in self.state.locals.items():
            local.copy_(found[name])


class Safetensors(Way):
    """safetensors' save_file of each rank's tensors, then fsync."""

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        path = folder / f"rank-{self.place.rank}.safetensors"
        save_file(self.state.locals, path)
        self.returned()
        fsync_file(path)

    def load(self, folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / f"rank-{self.place.rank}.safetensors", framework="pt") as found:
            for name, local in self.state.locals.items():
                local.copy_(found.get_tensor(name))


class DcpSave(Way):
    """torch.distributed.checkpoint.save, syncing its files, with its plan cached."""

    threads = 1

    def save(self, folder: Path) -> None:
        dcp.save(self.state.dtensors(), storage_writer=self._writer(folder), planner=self._planner())

    def load(self, folder: Path) -> None:
        dcp.load(self.state.dtensors(), storage_reader=dcp.FileSystemReader(folder))

    def _writer(self, folder: Path) -> Any:
        return dcp.FileSystemWriter(folder, thread_count=self.threads)

    def _planner(self) -> Any:
        return DefaultSavePlanner(enable_plan_caching=True)


class DcpSaveThreads(DcpSave):
    """The same with two threads and two files a rank."""

    threads = 2


class DcpAsync(DcpSave):
    """async_save with staging memory that is kept, in a thread or a process, staged at once or beside training."""

    asynchronous = True

    def __init__(self, *args: Any, kind: AsyncCheckpointerType, aside: bool) -> None:
        super().__init__(*args)
        self._kind, self._aside = kind, aside
        self._stager: Any = None
        self._tensors: Any = None
        self._staging: Future[None] | None = None
        self._upload: Future[Any] | None = None
        self._moments: dict[str, float] = {}

    def start(self) -> None:
        # Pinning needs CUDA, and so do copies that do not block.
        shared = self._kind is AsyncCheckpointerType.PROCESS
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=self._aside,
            use_non_blocking_copy=False,
        )
        if self._stager is None:
            # The stager's memory is kept by the tensors it was copied from: they must be the same each time.
            self._tensors, self._stager = self.state.dtensors(), DefaultStager(options)

    def warm(self) -> None:
        if self._stager is None:
            self.start()
            staged = self._stager.stage(self._tensors)
            if isinstance(staged, Future):
                staged.result()

    def begin(self, folder: Path) -> None:
        self._moments = {}
        answer = dcp.async_save(
            self._tensors,
            storage_writer=self._writer(folder),
            planner=self._planner(),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staging, self._upload = answer.staging_completion, answer.upload_completion
            self._staging.add_done_callback(functools.partial(self._mark, "staged"))
        else:
            self._staging, self._upload = None, answer
        self._upload.add_done_callback(functools.partial(self._mark, "durable"))

    def _mark(self, moment: str, _: Future[Any]) -> None:
        self._moments[moment] = time.monotonic()

    def await_staged(self) -> None:
        if self._staging is not None:
            self._staging.result()

    def staged_s(self) -> float | None:
        return self._moments.get("staged")

    def busy(self) -> bool:
        assert self._upload is not None
        return not self._upload.done()

    def advance(self, busy: bool) -> float | None:
        if busy:
            return None
        assert self._upload is not None
        self._upload.result()
        while "durable" not in self._moments:  # callbacks follow the result by a moment
            time.sleep(0.0001)
        return self._moments["durable"]

    def release(self) -> None:
        if self._stager is not None:
            self._stager.close()
        self._stager = self._tensors = None


_THREAD, _PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS

PEERS: dict[str, Any] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "dcp": DcpSave,
    "dcp-2-threads": DcpSaveThreads,
    "dcp-async-thread": functools.partial(DcpAsync, kind=_THREAD, aside=False),
    "dcp-async-process": functools.partial(DcpAsync, kind=_PROCESS, aside=False),
    "dcp-async-thread-staging": functools.partial(DcpAsync, kind=_THREAD, aside=True),
    "dcp-async-process-staging": functools.partial(DcpAsync, kind=_PROCESS, aside=True),
}
