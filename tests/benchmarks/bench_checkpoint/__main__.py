"""Checkpoints beside their limits and beside other ways of saving, in one run.

For each size of state and number of ranks: what training waits, when a save is durable, how much slower steps are
meanwhile, what is lost in all, how the first save differs, and how long a verified cold load takes, here and on other
numbers of ranks. Limits and ways take turns in random order within each round; shown are medians, with the least and
the most, of ratios to the limit of the same round. The rules are those of MLPerf Storage: a time is that of the slowest
rank, what is saved is synced, what is read is not in the page cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bench_checkpoint import figures, flat, plan, report
from bench_checkpoint.rounds import Bench, Progress, available_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the figures; 1 when something of ours failed."""
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without removing what is there
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=args.folder))
    try:
        result = {"machine": _machine(), "arguments": vars(args) | {"folder": str(args.folder), "json": None}}
        for part in [_flat(folder, args.flat_saves)] if args.flat else _matrix(folder, args):
            result |= part
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = (way for case in result.get("cases", []) for way in case["failed"])
    return int(any(way == "all" or way.startswith("cfe") for way in failed))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = "numbers, comma-separated"
    parser.add_argument("--sizes", default="0.2,1.5,4", help=f"GB of state, of all ranks; {numbers} (%(default)s)")
    parser.add_argument("--ranks", default="1,2,4", help=f"ranks; {numbers} (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="beside one of first saves (%(default)s)")
    parser.add_argument("--methods", default=",".join(plan.EVERY_WAY), help="comma-separated (all: %(default)s)")
    parser.add_argument("--zero", default="1,2,3", help=f"DeepSpeed's stages; {numbers} (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="write every round's figures to this file")
    parser.add_argument("--quick", action="store_true", help="0.2 GB, 2 ranks, 3 rounds")
    parser.add_argument("--flat", action="store_true", help="only: many saves, and many checkpoints in the folder")
    parser.add_argument("--flat-saves", type=int, default=200, help="of the former, 50 steps apart (%(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.ranks, args.rounds = "0.2", "2", 3
    args.methods = args.methods.split(",")
    unknown = sorted(set(args.methods) - set(plan.EVERY_WAY))
    if unknown:
        parser.error(f"--methods: {', '.join(unknown)}: unknown; there are {', '.join(plan.EVERY_WAY)}")
    try:
        args.sizes = [round(float(size) * 1e9) for size in args.sizes.split(",")]
        args.ranks = [int(count) for count in args.ranks.split(",")]
        args.zero = [int(stage) for stage in args.zero.split(",")]
    except ValueError as error:
        parser.error(f"--sizes, --ranks and --zero are {numbers}: {error}")
    return args


def _matrix(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that is found so far, after each case: a run of half an hour may be broken off."""
    every = plan.cases(args.sizes, args.ranks, args.methods, args.zero)
    progress = Progress(sum(case.weight() for case in every) * (args.rounds + 1))
    found: list[dict[str, Any]] = []
    for state_bytes in args.sizes:
        _check_room(folder, state_bytes)
        with closing(Bench(folder, args.ranks, args.rounds)) as bench:
            for case in every:
                if case.state_bytes == state_bytes:
                    found.append(_run(bench, case, progress))
                    print("\n".join(report.table(found[-1])), flush=True)
                    yield {"cases": found}
    goals = figures.goals(found, plan.DCP_ASYNC)
    print("\n".join([*report.verdicts(goals), "", *plan.NOTES]))
    yield {"cases": found, "goals": goals, "notes": plan.NOTES}


def _run(bench: Bench, case: plan.Case, progress: Progress) -> dict[str, Any]:
    found = {"name": case.name, "size_gb": case.state_bytes / 1e9, "ranks": case.ranks, "zero": case.zero}
    found["ways"] = list(case.ways)
    found |= bench.run(case, progress)
    return found | {"summary": figures.summary(found) if found["rounds"] else {}}


def _check_room(folder: Path, state_bytes: int) -> None:
    free, memory = shutil.disk_usage(folder).free, available_bytes()
    if free < 3 * state_bytes:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free; {state_bytes / 1e9:g} GB of state take three times that")
    if memory < 5 * state_bytes:
        sys.exit(f"{memory / 1e9:.1f} GB of memory are free; {state_bytes / 1e9:g} GB of state take five times that")


def _flat(folder: Path, saves: int) -> dict[str, Any]:
    found = flat.measure(folder, saves)
    print(f"after {found['steps']['steps']} steps, beside after {flat.EARLY_SAVES}; beside {flat.MANY} checkpoints")
    for name, value in ((name, value) for part in found.values() for name, value in part.items()):
        if isinstance(value, float):
            met = "" if "/" not in name else " met" if value <= flat.AT_MOST else f" more than {flat.AT_MOST}"
            print(f"  {name:<24} {value:.4f}{met}")
    return {"flat": found}


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    sys.exit(main())
