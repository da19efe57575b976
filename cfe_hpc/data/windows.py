"""Windows of seq_len + 1 tokens over one split of a token file, every byte verified before it is trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfe_hpc.data.format import READ_ERRORS, open_token_file, read_facts
from cfe_hpc.errors import DataError

__all__ = ["TokenWindows"]


class TokenWindows:
    """The windows of one split: window i holds tokens [i·seq_len, (i+1)·seq_len], so each but the first token of
    the split is predicted once, and the last up to seq_len - 1 tokens never.

    The header is read at construction; the tokens at the first read, so that an object made before a fork is good
    in every child. A split of up to `memory_limit_bytes` is kept in memory, once per process. A larger one stays
    in the file: each window is one positional read, and the chunk around it (1 MiB) is read through Fletcher-32
    the first time it is touched; memory is then 2 MiB at most.

    Attributes:
        seq_len: tokens that a window predicts.
        vocab_size: every token is below it.
        num_tokens: tokens of the split.
        dtype: of the stored tokens, uint8 or uint16.
        tokens_sha256: of the split's tokens, as the header states it.

    Raises:
        DataError: the file is missing, damaged, no token file, or too short for one window.
    """

    def __init__(
        self, path: str | os.PathLike[str], split: str = "train", *, seq_len: int, memory_limit_bytes: int = 256 << 20
    ) -> None:
        self.path = Path(path)
        self.split = split
        self.seq_len = seq_len
        with open_token_file(self.path) as file:
            facts = read_facts(self.path, file)
        if split not in facts.splits:
            raise DataError(f"{self.path}: no such split ({split}); splits are {', '.join(facts.splits)}")
        if seq_len < 1:
            raise DataError(f"{self.path}: seq_len must be at least 1 ({seq_len}); give the model's context length")
        self.vocab_size = facts.vocab_size
        self.num_tokens = facts.splits[split].tokens
        self.tokens_sha256 = facts.splits[split].tokens_sha256
        self.dtype = np.dtype(facts.dtype)
        self._count = max(0, (self.num_tokens - 1) // seq_len)
        if self._count == 0:
            raise DataError(
                f"{self.path}: {split} has {self.num_tokens} tokens, fewer than one window of {seq_len + 1}; "
                "add text or shorten seq_len"
            )
        self._in_memory = self.num_tokens * self.dtype.itemsize <= memory_limit_bytes
        self._reader: _MemoryReader | _FileReader | None = None
        self._reader_pid = -1

    def __len__(self) -> int:
        return self._count

    @property
    def in_memory(self) -> bool:
        """Whether the split is kept in memory."""
        return self._in_memory

    def read(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the given windows, int64, [len(windows), seq_len + 1].

        Raises:
            DataError: a chunk is damaged; names the split and the tokens.
        """
        return self._open().read(windows).astype(np.int64)

    def _open(self) -> _MemoryReader | _FileReader:
        if self._reader is None or (self._reader_pid != os.getpid() and not self._in_memory):
            make = _MemoryReader if self._in_memory else _FileReader
            self._reader = make(self._reopen(), self)
            self._reader_pid = os.getpid()
        return self._reader

    def _reopen(self) -> Any:
        file = open_token_file(self.path)
        facts = read_facts(self.path, file).splits[self.split]
        if facts.tokens_sha256 != self.tokens_sha256:
            file.close()
            raise DataError(f"{self.path}: was replaced by another token file meanwhile; start the run again")
        return file


def _read_tokens(of: TokenWindows, dataset: Any, start: int, stop: int) -> npt.NDArray[Any]:
    try:
        tokens: npt.NDArray[Any] = dataset[start:stop]
    except READ_ERRORS as error:
        raise DataError(
            f"{of.path}: {of.split}/tokens is damaged between tokens {start} and {stop}; "
            "see `cfe-hpc data check`, then build the file again"
        ) from error
    return tokens


class _MemoryReader:
    """The whole split in memory, read once through Fletcher-32."""

    def __init__(self, file: Any, of: TokenWindows) -> None:
        with file:
            dataset = file[of.split]["tokens"]
            step = dataset.chunks[0] * 16
            tokens = np.empty(dataset.shape, dtype=of.dtype)
            for start in range(0, len(tokens), step):
                stop = min(start + step, len(tokens))
                tokens[start:stop] = _read_tokens(of, dataset, start, stop)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, of.seq_len + 1)
        self._windows = windows[:: of.seq_len]

    def read(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self._windows[windows]


class _FileReader:
    """Positional reads of windows out of the file's chunks, each verified when first touched."""

    def __init__(self, file: Any, of: TokenWindows) -> None:
        self._of = of
        self._file = file
        self._dataset = file[of.split]["tokens"]
        self._chunk = int(self._dataset.chunks[0])
        self._offsets: dict[int, int] = {}
        self._fd = os.open(of.path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        rows = np.empty((len(windows), self._of.seq_len + 1), dtype=self._of.dtype)
        for row, window in zip(rows, windows, strict=True):
            self._read_into(row, int(window) * self._of.seq_len)
        return rows

    def _read_into(self, row: npt.NDArray[Any], start: int) -> None:
        done = 0
        while done < len(row):
            chunk, within = divmod(start + done, self._chunk)
            part = row[done : done + self._chunk - within]
            offset = self._offset(chunk) + within * self._of.dtype.itemsize
            if os.preadv(self._fd, [part.data], offset) != part.nbytes:
                raise DataError(f"{self._of.path}: {self._of.split}/tokens ends early; build the file again")
            done += len(part)

    def _offset(self, chunk: int) -> int:
        """Where the chunk's first token lies in the file, the chunk being verified."""
        if chunk not in self._offsets:
            start = chunk * self._chunk
            stop = min(start + self._chunk, len(self._dataset))
            _read_tokens(self._of, self._dataset, start, stop)
            self._offsets[chunk] = self._dataset.id.get_chunk_info_by_coord((start,)).byte_offset
        return self._offsets[chunk]
