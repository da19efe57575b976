"""Tokens per second of the loader, beside a plain DataLoader over the same file and beside memory itself.

    python tests/benchmarks/bench_data.py [--json FILE] [--rounds N]

Contenders take turns within each round; the table shows medians. `numpy gather` picks the same random rows out of
an array in memory and widens them to int64, with no order to compute, no position and no checks: the limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from cfe_hpc.data.build import BuildOptions, build
from cfe_hpc.data.loader import BatchLoader, TokenWindows
from cfe_hpc.data.sources import stdlib_sources

SEQ_LEN = 256
BATCH = 32


class PlainDataset(torch.utils.data.Dataset[torch.Tensor]):
    """What one writes first: one h5py read for each window."""

    def __init__(self, path: Path) -> None:
        self._tokens = h5py.File(path, "r", locking=False)["train/tokens"]

    def __len__(self) -> int:
        return int((len(self._tokens) - 1) // SEQ_LEN)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * SEQ_LEN
        return torch.from_numpy(self._tokens[start : start + SEQ_LEN + 1].astype(np.int64))


def ours(path: Path, **options: int) -> Iterator[Any]:
    """Batches of this package's loader."""
    loader = BatchLoader(TokenWindows(path, seq_len=SEQ_LEN, **options), global_batch=BATCH)
    while True:
        yield torch.from_numpy(loader.next_batch())


def plain(path: Path, workers: int) -> Iterator[Any]:
    """Batches of a shuffling torch DataLoader."""
    dataset = PlainDataset(path)
    while True:
        yield from torch.utils.data.DataLoader(
            dataset, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers
        )


def gather(path: Path) -> Iterator[Any]:
    """Random rows of an array in memory."""
    with h5py.File(path, "r", locking=False) as file:
        tokens = file["train/tokens"][...]
    rows = np.lib.stride_tricks.sliding_window_view(tokens, SEQ_LEN + 1)[::SEQ_LEN]
    chosen = np.random.default_rng(0).permutation(len(rows))
    while True:
        for start in range(0, len(rows) - BATCH, BATCH):
            yield rows[chosen[start : start + BATCH]].astype(np.int64)


def tokens_per_second(batches: Iterator[Any], duration_s: float) -> float:
    """Pull batches for about `duration_s`, the first left out: it opens the file."""
    next(batches)
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < duration_s:
        next(batches)
        count += 1
    return count * BATCH * SEQ_LEN / passed


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each contender in each round")
    parser.add_argument("--model-tokens-per-second", type=float, default=40_000, help="what the model consumes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stdlib.h5")
        build(path, stdlib_sources(), options=BuildOptions(skip_unusable=True))
        contenders: dict[str, Callable[[], Iterator[Any]]] = {
            "numpy gather (limit)": lambda: gather(path),
            "ours, in memory": lambda: ours(path),
            "ours, from the file": lambda: ours(path, memory_limit_bytes=0),
            "torch DataLoader + h5py": lambda: plain(path, 0),
            "torch DataLoader, 1 worker": lambda: plain(path, 1),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, make in contenders.items():
                rates[name].append(tokens_per_second(make(), args.seconds))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    peer, limit = medians["torch DataLoader + h5py"], medians["numpy gather (limit)"]
    print(f"{'':<28}{'Mtokens/s':>10}{'/ peer':>9}{'/ limit':>9}{'/ model':>9}")
    for name, rate in medians.items():
        ratios = f"{rate / peer:>9.2f}{rate / limit:>9.2f}{rate / args.model_tokens_per_second:>9.0f}"
        print(f"{name:<28}{rate / 1e6:>10.2f}{ratios}")
    if args.json:
        figures = {"seq_len": SEQ_LEN, "batch": BATCH, "rounds": args.rounds, "tokens_per_second": rates}
        args.json.write_text(json.dumps({**figures, "median": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
