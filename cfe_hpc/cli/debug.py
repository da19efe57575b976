"""`debug JOB`, `debug --attach RUN`: one rank in this terminal, under the debugger or as a shell."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from cfe_hpc.cli import common
from cfe_hpc.errors import UsageError

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "Run a job's first rank in this terminal, in the site's debug partition and with the job's environment: its "
        "entry or Python program under pdb, or a shell. With --attach a shell beside a rank of a run that runs."
    )
    common.add_job_arguments(parser, optional=True)
    parser.add_argument("--shell", action="store_true", help="a shell in place of the debugger")
    parser.add_argument(
        "--ranks",
        metavar="N",
        type=int,
        default=1,
        help="ranks of the session (default 1); those after the first run as in a job",
    )
    parser.add_argument("--time", metavar="T", help="longest time of the session (default 1h, or the partition's)")
    parser.add_argument("--attach", metavar="RUN", help="a shell beside a rank of this run, in its allocation")
    parser.add_argument("--rank", metavar="N", type=int, help="with --attach: the rank (default 0)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")


def run(args: argparse.Namespace) -> int:
    """Hold the session; the status of what ran in it."""
    if (args.job is None) == (args.attach is None):
        raise UsageError("debug: give either JOB or --attach RUN")
    if args.attach is None and args.rank is not None:
        raise UsageError("--rank: is for --attach; a session holds rank 0, and --ranks says how many there are")
    if args.ranks < 1:
        raise UsageError(f"--ranks: not a number of ranks ({args.ranks}); give 1 or more")
    if not args.dry_run and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("debug: needs a terminal to talk to you in; start it from one, or see --dry-run")
    return _attach(args) if args.attach is not None else _debug(args)


def _attach(args: argparse.Namespace) -> int:
    from cfe_hpc.launch.attaching import attach, attachment

    folder = common.find_run(args, args.attach)
    attached = attachment(folder, args.rank or 0)
    if args.dry_run:
        print(shlex.join(attached.argv))
        return 0
    print(f"{folder.run_id}: rank {args.rank or 0} on {attached.node}", file=sys.stderr)
    return attach(attached)


def _debug(args: argparse.Namespace) -> int:
    from cfe_hpc.launch import debug
    from cfe_hpc.launch.plan import plan
    from cfe_hpc.launch.provenance import WorkTree
    from cfe_hpc.launch.submission import prepare, preview

    work_tree = WorkTree(Path.cwd())
    loaded = debug.shrink(common.of_one_run(common.load_job(args)), ranks=args.ranks, time_s=_time_s(args.time))
    planned = plan(loaded.job, loaded.site, loaded.origins)
    if args.dry_run:
        spec, folder, _ = preview(loaded, planned, work_tree)
        print(shlex.join(debug.session_argv(spec, folder)), end="\n\n")
        print(debug.session_script(spec, folder, shell=args.shell), end="")
        return 0
    spec, folder = prepare(loaded, planned, work_tree, name=f"{loaded.job.name}-debug")
    if spec.site.scheduler == "slurm":
        nodes = "1 node" if planned.nodes == 1 else f"{planned.nodes} nodes"
        print(f"{folder.run_id}: asking for {nodes} of {planned.partition}", file=sys.stderr)
    return debug.hold_session(spec, folder, script=debug.session_script(spec, folder, shell=args.shell))


def _time_s(text: str | None) -> float | None:
    from cfe_hpc.units import parse_duration_s

    try:
        return None if text is None else parse_duration_s(text)
    except ValueError as error:
        raise UsageError(f"--time: {error} ({text}); write for example 30m") from error
