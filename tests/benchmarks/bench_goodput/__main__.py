"""Goodput under preemptions, on a real Slurm: the same training, run by cfe_hpc, by submitit with its checkpoint() hook
and periodic saves, and by a batch script with the usual trap, all under the same seeded preemptions.

The ways take turns in random order, each alone on a cluster of scripts/slurm, and between them the bare times of the
same round are taken: imports, a load, a step and a save of the same training. Goodput is the bare time of the steps of
the run ÷ the time that Slurm accounts for; the ideal is what imports and a bare load in each allocation leave of that.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from slurm.cluster import Cluster, why_impossible

from bench_goodput import report, schedule
from bench_goodput.rounds import disturb, read_bare
from bench_goodput.ways import OURS, WAYS, bare

_BARE_STEPS = 150
"""Some ten seconds: the first steps of a process are faster than those of a long run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the figures; 1 when ours lost a step, did not end, or ended with other weights."""
    args = _arguments(argv)
    if reason := why_impossible():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without taking the cluster down
    os.environ["OMP_NUM_THREADS"] = "1"
    preemptions_s = schedule.preemptions_s(args.seed, args.preemptions, args.mean)
    print(f"seed {args.seed}: preempted after {', '.join(f'{s:g}' for s in preemptions_s)} s of each allocation")
    options = ["--nodes", "2", "--gaudi-nodes", "0", *(["--user-signal"] if args.user_signal else [])]
    with tempfile.TemporaryDirectory(prefix="bench-goodput-", dir=args.folder) as folder:
        cluster = Cluster.start(*options)
        try:
            result = _rounds(cluster, Path(folder), args, preemptions_s)
        finally:
            cluster.stop()
    print("\n".join(["", *report.table(result["rows"], result["bare"])]))
    return int(any(not _good(row) for row in result["rows"] if row["way"] == OURS) or len(result["weights"]) > 1)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_goodput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of preemptions and order (%(default)s)")
    parser.add_argument("--preemptions", type=int, default=2, help="of each run (%(default)s)")
    parser.add_argument("--mean", type=float, default=90.0, help="mean seconds of an allocation (%(default)s)")
    parser.add_argument("--steps", type=int, help="of the training (what leaves 0.6 of a mean after the last one)")
    parser.add_argument("--every", type=int, default=150, help="steps from one periodic save to the next (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="about 17 minutes each (%(default)s)")
    parser.add_argument("--ways", default=";".join(WAYS), help='separated by ";" (%(default)s)')
    parser.add_argument("--user-signal", action="store_true", help="a site that preempts with the job's own signal")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    args = parser.parse_args(argv)
    args.ways = args.ways.split(";")
    if unknown := sorted(set(args.ways) - set(WAYS)):
        parser.error(f"--ways: no {', '.join(unknown)}; there are {', '.join(WAYS)}")
    if not args.folder.is_dir():
        parser.error(f"--folder: no such folder ({args.folder}); make it, on the disk to measure")
    return args


def _rounds(cluster: Cluster, folder: Path, args: argparse.Namespace, preemptions_s: list[float]) -> dict[str, Any]:
    words = {key: value for key, value in vars(args).items() if key not in ("folder", "json")}
    result: dict[str, Any] = {"arguments": words, "slurm": cluster.run("scontrol", "--version").strip()}
    result |= {"preemptions_s": preemptions_s, "bare": [], "rows": [], "outcomes": [], "weights": []}
    beside = folder / "bare"
    beside.mkdir()
    bare(cluster, beside, 2)  # the first import reads everything from the disk
    bare(cluster, beside, _BARE_STEPS)
    steps = args.steps or _enough_steps(read_bare(beside)[-1], preemptions_s, args.mean)
    words["steps"] = steps
    print(f"{steps} steps", flush=True)
    for number in range(args.rounds):
        taken = len(read_bare(beside))
        bare(cluster, beside, _BARE_STEPS)
        outcomes = []
        for way in schedule.order(args.seed, number, args.ways):
            where = folder / f"{number}" / way.replace(", ", "-").replace(" ", "-")
            outcome = disturb(cluster, way, where, preemptions_s=preemptions_s, steps=steps, every=args.every)
            print(f"round {number}: {way}: {outcome.allocated_s:g} s, {len(outcome.steps)} steps", flush=True)
            outcomes.append(outcome)
            bare(cluster, beside, _BARE_STEPS)
        lines = read_bare(beside)[taken:]
        keys = ("imports_s", "load_s", "step_s", "step_median_s", "save_s", "write_s")
        result["bare"].append({key: median(line[key] for line in lines) for key in keys} | {"lines": lines})
        result["rows"] += [report.figures(outcome, result["bare"][-1], steps) for outcome in outcomes]
        result["outcomes"] += [asdict(outcome) for outcome in outcomes]
        result["weights"] = sorted({each["weights"] for each in result["outcomes"] if each["weights"]})
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _enough_steps(measured: dict[str, float], preemptions_s: Sequence[float], mean_s: float) -> int:
    """As many as fit between the preemptions, and a few more: the last allocation is left alone."""
    training_s = sum(preemptions_s) - len(preemptions_s) * (measured["imports_s"] + measured["load_s"] + 1.0)
    return round((training_s + 0.6 * mean_s) / measured["step_s"])


def _good(row: dict[str, Any]) -> bool:
    return bool(row["ended"]) and row["lost"] == 0


if __name__ == "__main__":
    sys.exit(main())
