"""A chaos campaign on a real Slurm: runs of two nodes are preempted, requeued, killed, stopped, poisoned and starved in
an order that follows from a seed, and each must end as its plan predicts.

A run is good when it is COMPLETED at the right step with the weights of a run that nobody hurt, or HELD by the budget
that its plan overspends; when no step was lost where a grace existed, and no more than those since the last save
elsewhere; when each attempt was requeued for the reason it ended for; and when no process and no job is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from checkpoint_disks import ext4
from slurm.cluster import why_impossible

from chaos.campaign import Outcome, SharedCluster, build_data, campaign
from chaos.kinds import KINDS
from chaos.plan import RunPlan, plan
from chaos.ward import Surroundings

_DISK_BYTES = 64 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Hurt, judge, print; 1 when a run is not as it should be."""
    args = _arguments(argv)
    plans = plan(args.seed, args.faults, args.kinds)
    plans = [each for each in plans if args.runs is None or each.number in args.runs]
    if args.dry_run:
        print("\n".join(_told(each) for each in plans))
        return 0
    if reason := why_impossible():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without taking the cluster down
    os.environ["OMP_NUM_THREADS"] = "1"
    faults = sum(len(each.faults) for each in plans)
    print(f"seed {args.seed}: {faults} faults on {len(plans)} runs, {args.at_a_time} at a time", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", dir=args.folder)))
        gateway = stack.enter_context(_pushgateway()) if shutil.which("prometheus-pushgateway") else None
        # Two nodes more than the runs take: some nodes are dead or avoided for a while.
        options = ["--nodes", str(2 * args.at_a_time + 4), "--gaudi-nodes", "0", "--memory-limits"]
        cluster = SharedCluster.start(*options)
        stack.callback(cluster.stop)
        data = build_data(folder / "data", cluster.env)
        around = Surroundings(data=data, disk=lambda path: ext4(path, _DISK_BYTES), pushgateway=gateway)
        outcomes = []
        for outcome in campaign(cluster, folder, plans, around, at_a_time=args.at_a_time):
            print(_row(outcome), flush=True)
            outcomes.append(outcome)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return _conclude(outcomes)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [each.name for each in KINDS]
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything that is chosen (%(default)s)")
    parser.add_argument("--faults", type=int, default=42, help="at least so many (%(default)s)")
    parser.add_argument("--at-a-time", type=int, default=4, metavar="RUNS", help="at most 6 (%(default)s)")
    parser.add_argument("--kinds", default=",".join(names), help="comma-separated (all: %(default)s)")
    parser.add_argument("--runs", help="only these runs of the plan, comma-separated")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each run to this file")
    args = parser.parse_args(argv)
    args.kinds = args.kinds.split(",")
    if unknown := sorted(set(args.kinds) - set(names)):
        parser.error(f"--kinds: no {', '.join(unknown)}; there are {', '.join(names)}")
    if not 1 <= args.at_a_time <= 6:
        parser.error("--at-a-time: from 1 to 6")
    args.runs = args.runs and [int(number) for number in args.runs.split(",")]
    return args


@contextlib.contextmanager
def _pushgateway() -> Iterator[tuple[int, str]]:
    """A Pushgateway of our own: process id and URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    argv = ["prometheus-pushgateway", f"--web.listen-address={address}", "--persistence.file="]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process.pid, f"http://{address}"
    finally:
        process.kill()
        process.wait()


def _told(each: RunPlan) -> str:
    """A plan as a line."""
    faults = " ".join(f"{fault.kind}+{fault.after}@{fault.rank}" for fault in each.faults)
    saves = ", saves beside training" if each.beside else ""
    return (
        f"run {each.number:>2} {each.workload:<8} {faults}{f' (held by {each.held_by})' if each.held_by else ''}{saves}"
    )


def _row(outcome: Outcome) -> str:
    lost = sum(outcome.lost.values())
    verdict = "good" if not outcome.problems else "BAD: " + "; ".join(outcome.problems)
    told = f"{outcome.state:<9} {outcome.attempts:>2} attempts, {lost:>2} lost, {outcome.seconds:>4.0f} s"
    return f"{_told(outcome.plan)}\n       {told}: {verdict}"


def _conclude(outcomes: Sequence[Outcome]) -> int:
    bad = [outcome for outcome in outcomes if outcome.problems]
    for outcome in bad:
        print(f"\n--- run {outcome.plan.number}\n{outcome.diagnosis}")
    counts: dict[str, int] = {}
    for fault in [fault for outcome in outcomes for fault in outcome.plan.faults]:
        counts[fault.kind] = counts.get(fault.kind, 0) + 1
    print("\n" + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"{sum(counts.values())} faults, {len(outcomes) - len(bad)} of {len(outcomes)} runs good")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
