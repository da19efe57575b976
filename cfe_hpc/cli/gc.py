"""`gc`: plan a clean-up of runs, look at it, and carry it out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common

if TYPE_CHECKING:
    from pathlib import Path

    from cfe_hpc.launch.cleaning.choice import Choice, Criteria, Item
    from cfe_hpc.launch.cleaning.plan import CleaningPlan

__all__ = ["configure", "run"]

_OLDER = "30d"
_SHOWN = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    from cfe_hpc.launch.cleaning.kinds import KINDS

    parser.description = (
        "`gc --plan` finds what may go, by age, state and size, and keeps the list under a name; `gc PLAN` removes "
        "exactly that, or nothing at all when something of it has changed. A run that has not ended stays, and so does "
        "one with a pinned checkpoint, and one that another run needs."
    )
    parser.add_argument("plan_id", metavar="PLAN", nargs="?", help="carry out this plan: its name, or its file")
    parser.add_argument("--plan", action="store_true", help="find what may go, and remove nothing")
    parser.add_argument(
        "--older", metavar="TIME", help=f"that gave its last sign of life so long ago, e.g. 12h; {_OLDER} when left out"
    )
    parser.add_argument(
        "--state",
        metavar="STATE",
        action="append",
        help="of runs that ended so: COMPLETED, FAILED, CANCELLED or HELD; may be given again; all but HELD when left "
        "out",
    )
    parser.add_argument("--larger", metavar="SIZE", help="each of at least this size, e.g. 10GB")
    parser.add_argument(
        "--keep-last", metavar="N", type=int, default=0, help="the newest N runs of each job, or checkpoints, stay"
    )
    parser.add_argument(
        "--what",
        metavar="KIND",
        action="append",
        choices=list(KINDS),
        help=f"{', '.join(KINDS)}; may be given again; runs, snapshots and trash when left out",
    )
    common.add_site_argument(parser)
    common.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, or carry out."""
    from cfe_hpc.errors import UsageError

    chosen = [args.older, args.state, args.larger, args.what, args.keep_last or None]
    if args.plan == (args.plan_id is not None):
        from cfe_hpc.launch.cleaning.plan import known_plans

        newest = known_plans()[-1:]
        hint = f"carry one out with `cfe-hpc gc {newest[0]}`, or " if newest and not args.plan else ""
        what = "both --plan and a plan are given" if args.plan else "no plan is named"
        raise UsageError(f"gc: {what}; {hint}find what may go with `cfe-hpc gc --plan`")
    if args.plan:
        return _plan(args)
    if any(value is not None for value in chosen):
        raise UsageError("gc: a plan is carried out as it is; give what chooses together with --plan")
    return _carry_out(args)


def _criteria(args: argparse.Namespace) -> Criteria:
    from cfe_hpc.config.nearest import nearest
    from cfe_hpc.errors import UsageError
    from cfe_hpc.launch.cleaning.choice import Criteria
    from cfe_hpc.launch.cleaning.survey import STATES
    from cfe_hpc.units import parse_duration_s, parse_size_bytes

    def read(option: str, text: str, parse: Any) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise UsageError(f"--{option}: {error} ({text})") from error

    for state in args.state or ():
        if state not in STATES:
            near = nearest(state, STATES)
            hint = f"did you mean {near}?" if near else f"runs end {', '.join(STATES)}"
            raise UsageError(f"--state: runs do not end so ({state}); {hint}")
    if args.keep_last < 0:
        raise UsageError(f"--keep-last: must be at least 0 ({args.keep_last})")
    criteria = Criteria(
        older_s=read("older", args.older or _OLDER, parse_duration_s),
        states=tuple(args.state or (state for state in STATES if state != "HELD")),
        larger_bytes=0 if args.larger is None else read("larger", args.larger, parse_size_bytes),
        keep_last=args.keep_last,
    )
    if args.what:
        from dataclasses import replace

        criteria = replace(criteria, kinds=tuple(dict.fromkeys(args.what)))
    return criteria


def _look(criteria: Criteria, roots: Sequence[Path], now_s: float, *, quiet: bool) -> tuple[Choice, list[str]]:
    """What may go now, and what schedulers said that gave no answer."""
    from cfe_hpc.cli.progress import bar
    from cfe_hpc.launch.cleaning.choice import choose
    from cfe_hpc.launch.cleaning.survey import survey
    from cfe_hpc.reports.find import runs_under

    seen, failures = survey(runs_under(roots), now_s=now_s)
    with bar("looking at runs", len(seen), quiet=quiet, counts=True) as told:
        return choose(criteria, seen, roots, now_s=now_s, told=told), failures


def _plan(args: argparse.Namespace) -> int:
    from cfe_hpc.launch.cleaning.plan import write_plan

    criteria, roots, now_s = _criteria(args), common.roots(args), time.time()
    choice, failures = _look(criteria, roots, now_s, quiet=args.json)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    written = write_plan(criteria, roots, choice, now_s=now_s) if choice.items else None
    if args.json:
        facts = {"plan": written and written[0].plan_id, "file": written and str(written[1])}
        size_bytes = sum(item.tree.size_bytes for item in choice.items)
        kept = [asdict(each) for each in choice.kept]
        items = [_as_json(item) for item in choice.items]
        common.print_json({**facts, "size_bytes": size_bytes, "items": items, "kept": kept})
    else:
        _print_plan(choice, written and written[0])
    return 3 if failures else 0


def _as_json(item: Item) -> dict[str, Any]:
    facts = {"kind": item.kind, "path": str(item.path), "run_id": item.run_id, "why": item.why}
    return {**facts, "size_bytes": item.tree.size_bytes, "entries": item.tree.entries}


def _print_plan(choice: Choice, plan: CleaningPlan | None) -> None:
    from cfe_hpc.launch.cleaning.choice import grouped
    from cfe_hpc.units import format_size

    for kind, items in grouped(choice.items).items():
        print(f"{kind}: {len(items)}, {format_size(sum(item.tree.size_bytes for item in items))}")
        for item in sorted(items, key=lambda item: -item.tree.size_bytes)[:_SHOWN]:
            print(f"  {format_size(item.tree.size_bytes):>9}  {item.path}  ({item.why})")
        if len(items) > _SHOWN:
            print(f"  and {len(items) - _SHOWN} smaller ones")
    for each in choice.kept[:_SHOWN]:
        print(f"stays: {each.run_id}: {each.why}")
    if len(choice.kept) > _SHOWN:
        print(f"stays: and {len(choice.kept) - _SHOWN} more, see --json")
    if plan is None:
        print("nothing may go")
    else:
        print(f"remove these {format_size(plan.size_bytes)} with: cfe-hpc gc {plan.plan_id}")


def _carry_out(args: argparse.Namespace) -> int:
    from cfe_hpc.cli.progress import bar
    from cfe_hpc.errors import RunFailed
    from cfe_hpc.launch.cleaning.plan import changes, read_plan
    from cfe_hpc.launch.cleaning.removal import remove

    plan, path = read_plan(args.plan_id)
    choice, failures = _look(plan.criteria, plan.roots, plan.now_s, quiet=args.json)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    changed = changes(plan, choice)
    if changed:
        more = [f"and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
        remedy = f"nothing was removed: {len(changed)} of {len(plan.items)} things have changed; make a new plan"
        raise RunFailed("\n".join([*changed[:_SHOWN], *more, f"{plan.plan_id}: {remedy} with `cfe-hpc gc --plan`"]))
    stayed: dict[str, str] = {}
    with bar("removing", plan.size_bytes, quiet=args.json) as told:
        for item in plan.items:
            why = remove(item, told)
            if why is not None:
                stayed[str(item.path)] = why
    path.unlink(missing_ok=True)
    _tell(args, plan, stayed)
    return 1 if stayed else 0


def _tell(args: argparse.Namespace, plan: CleaningPlan, stayed: dict[str, str]) -> None:
    from cfe_hpc.units import format_size

    removed = [item for item in plan.items if str(item.path) not in stayed]
    size_bytes = sum(item.tree.size_bytes for item in removed)
    if args.json:
        facts = {"plan": plan.plan_id, "size_bytes": size_bytes, "removed": [_as_json(item) for item in removed]}
        common.print_json({**facts, "stayed": [{"path": name, "why": why} for name, why in stayed.items()]})
        return
    for name, why in stayed.items():
        print(f"{name}: stays: {why}", file=sys.stderr)
    print(f"removed: {len(removed)}, {format_size(size_bytes)}")
