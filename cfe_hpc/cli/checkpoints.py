"""`checkpoints ls|verify|prune|export`: what a run has saved, whether it is whole, and what may go."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli.common import add_json_argument, add_run_argument, find_run, print_json
from cfe_hpc.errors import CorruptCheckpoint, RunFailed, UsageError
from cfe_hpc.units import format_size

if TYPE_CHECKING:
    from cfe_hpc.checkpoints.reader import Opened
    from cfe_hpc.config.job import Checkpoint
    from cfe_hpc.runfolder import RunFolder

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all four actions."""
    parser.description = "List, verify, prune and export a run's checkpoints."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    ls = _action(actions, "ls", "the checkpoints of a run, the newest first; their bytes are not read")
    ls.add_argument(
        "--tensors", action="store_true", help="the tensors of one checkpoint, the newest unless --step names another"
    )
    verify = _action(actions, "verify", "read every byte and compare it with its checksum; exit 1 when any differs")
    prune = _action(actions, "prune", "delete what the job's policy does not keep, as a running job would")
    prune.add_argument("--keep-last", metavar="N", type=_positive, help="instead of the job's keep_last")
    prune.add_argument("--keep-every-steps", metavar="N", type=_positive, help="instead of the job's keep_every_steps")
    prune.add_argument("--keep-best", metavar="NAME:min|max", type=_best_rule, help="instead of the job's keep_best")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    export = _action(actions, "export", "write whole tensors, whichever ranks hold them, to one safetensors file")
    export.add_argument("file", metavar="FILE", type=Path, help="the file to write, or to replace")
    export.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help='only tensors whose names match, e.g. "model/*"; may be given again',
    )
    for each, otherwise in ((ls, "all"), (verify, "all"), (export, "the newest")):
        each.add_argument("--step", metavar="N", type=int, help=f"the checkpoint of this step; {otherwise} if left out")


def _action(actions: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=what, allow_abbrev=False)
    parser.description = f"{what[0].upper()}{what[1:]}."
    add_run_argument(parser)
    add_json_argument(parser)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _best_rule(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w./-]*:(min|max)", text):
        raise argparse.ArgumentTypeError(f'{text} is not like "val_loss:min"')
    return text


def run(args: argparse.Namespace) -> int:
    """Do the action on one run's checkpoints."""
    folder = find_run(args)
    if args.action == "ls":
        return _list_tensors(args, folder) if args.tensors else _list(args, folder)
    return {"verify": _verify, "prune": _prune, "export": _export}[args.action](args, folder)


def _folders(args: argparse.Namespace, folder: RunFolder) -> list[Path]:
    """The folders of checkpoints that are asked for, newest first."""
    from cfe_hpc.checkpoints import folders

    found = folders.committed(folder.checkpoints)
    if args.step is None:
        return [path for _, path in found]
    wanted = [path for step, path in found if step == args.step]
    if not wanted:
        there = ", ".join(str(step) for step, _ in found[:8]) or "none"
        raise UsageError(f"{folder.run_id}: no checkpoint of step {args.step}; there are {there}")
    return wanted


def _list(args: argparse.Namespace, folder: RunFolder) -> int:
    from cfe_hpc.checkpoints.rotation import glance

    rows: list[dict[str, Any]] = []
    for path in _folders(args, folder):
        try:
            manifest = glance(path, folder.run_id)
        except CorruptCheckpoint as error:
            rows.append({"name": path.name, "path": str(path), "usable": False, "reason": str(error)})
            continue
        identity = manifest.identity
        rows.append(
            {
                "name": path.name,
                "path": str(path),
                "usable": True,
                "step": identity.step,
                "attempt": identity.attempt,
                "world_size": identity.world_size,
                "time": manifest.time,
                "size_bytes": manifest.size_bytes,
                "metrics": {
                    name: value if value - value == 0 else str(value) for name, value in manifest.metrics.items()
                },
            }
        )
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        print(_row(row) if row["usable"] else f"{row['name']}  unusable: {row['reason']}")
    if not rows:
        print(f"{folder.run_id} has no checkpoints", file=sys.stderr)
    return 0


def _row(row: dict[str, Any]) -> str:
    metrics = "  ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in row["metrics"].items()
    )
    ranks = f"{row['world_size']} rank{'s' if row['world_size'] != 1 else ''}"
    parts = [row["name"], f"attempt {row['attempt']}", ranks, format_size(row["size_bytes"]), row["time"], metrics]
    return "  ".join(part for part in parts if part)


def _list_tensors(args: argparse.Namespace, folder: RunFolder) -> int:
    opened = _open(args, folder)
    rows = [
        {"name": name, "dtype": dtype, "shape": list(shape), "rank": rank}
        for rank, reader in _readers(opened)
        for name in reader.names()
        for dtype, shape in [reader.describe(name)]
    ]
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        whose = "" if row["rank"] is None else f"  (rank {row['rank']}'s own)"
        print(f"{row['name']}  {row['dtype']} {row['shape']}{whose}")
    return 0


def _readers(opened: Opened) -> Iterator[tuple[int | None, Any]]:
    yield None, opened.reader
    for rank in range(opened.world_size):
        yield rank, opened.own(rank)


def _open(args: argparse.Namespace, folder: RunFolder) -> Opened:
    """The checkpoint of --step, else the newest that opens; its tensors are checked as they are read."""
    from cfe_hpc.checkpoints.reader import Opened

    reasons = []
    for path in _folders(args, folder):
        try:
            return Opened.at(path, folder.run_id)
        except CorruptCheckpoint as error:
            reasons.append(f"{path.name}: {error}")
    raise RunFailed("\n".join(reasons) or f"{folder.run_id} has no checkpoints")


def _verify(args: argparse.Namespace, folder: RunFolder) -> int:
    from cfe_hpc.checkpoints.reader import Opened

    rows: list[dict[str, Any]] = []
    for path in _folders(args, folder):
        try:
            Opened.at(path, folder.run_id).verify()
            rows.append({"name": path.name, "verified": True, "reason": None})
        except CorruptCheckpoint as error:
            rows.append({"name": path.name, "verified": False, "reason": str(error)})
        if not args.json:
            print(f"{path.name}  " + ("verified" if rows[-1]["verified"] else f"unusable: {rows[-1]['reason']}"))
    if args.json:
        print_json(rows)
    elif not rows:
        print(f"{folder.run_id} has no checkpoints", file=sys.stderr)
    return 0 if all(row["verified"] for row in rows) else 1


def _prune(args: argparse.Namespace, folder: RunFolder) -> int:
    from cfe_hpc.checkpoints.rotation import inventory, rotate, superfluous

    policy, protected = _policy(args, folder), _protected(folder)
    if args.dry_run:
        steps = sorted(each.step for each in superfluous(inventory(folder.checkpoints), policy, protected))
    else:
        steps = rotate(folder.checkpoints, policy, protect=protected)
    if args.json:
        print_json({"deleted": [] if args.dry_run else steps, "superfluous": steps})
    else:
        verb = "would delete" if args.dry_run else "deleted"
        print("\n".join(f"{verb} step {step}" for step in steps) or "nothing to delete")
    return 0


def _policy(args: argparse.Namespace, folder: RunFolder) -> Checkpoint:
    from cfe_hpc.config.run import RunSpec

    asked = {"keep_last": args.keep_last, "keep_every_steps": args.keep_every_steps, "keep_best": args.keep_best}
    policy = RunSpec.read(folder.run_toml).job.checkpoint
    return policy.model_copy(update={key: value for key, value in asked.items() if value is not None})


def _protected(folder: RunFolder) -> set[int]:
    """The newest step that verifies in full, and the one that the last attempt resumed from."""
    from cfe_hpc.checkpoints import folders
    from cfe_hpc.checkpoints.reader import Opened

    resumed = [event.get("step") for event in folder.events() if event.get("event") == "resumed"]
    protected = {step for step in resumed[-1:] if isinstance(step, int)}
    for step, path in folders.committed(folder.checkpoints):
        try:
            Opened.at(path, folder.run_id).verify()
        except CorruptCheckpoint:
            continue
        return protected | {step}
    return protected


def _export(args: argparse.Namespace, folder: RunFolder) -> int:
    from cfe_hpc.checkpoints.export import export_safetensors

    opened = _open(args, folder)
    names = [
        name for name in opened.reader.names() if not args.only or any(fnmatchcase(name, each) for each in args.only)
    ]
    if not names:
        raise UsageError(f"--only: no tensor of {opened.folder.name} matches; see `checkpoints ls RUN --tensors`")
    try:
        size_bytes = export_safetensors(opened, names, args.file)
    except OSError as error:
        raise UsageError(f"{args.file}: cannot be written: {error.strerror}") from error
    if args.json:
        print_json({"file": str(args.file), "step": opened.step, "tensors": len(names), "size_bytes": size_bytes})
    else:
        print(f"{args.file}  step {opened.step}  {len(names)} tensors  {format_size(size_bytes)}")
    return 0
