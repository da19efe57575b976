"""`checkpoints verify|diff`: every byte against its checksum, and two checkpoints against each other."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.keeping.verified import verify as verify_one
from cfe_hpc.checkpoints.reader import Opened, read_manifest
from cfe_hpc.checkpoints.state.weights import shared
from cfe_hpc.checkpoints.tools.differences import Changed, Comparison, compare
from cfe_hpc.checkpoints.tools.export import size_bytes
from cfe_hpc.cli.checkpoints_common import chosen, open_chosen
from cfe_hpc.cli.common import find_run, print_json
from cfe_hpc.cli.progress import bar
from cfe_hpc.errors import CorruptCheckpoint, UsageError
from cfe_hpc.units import format_size

__all__ = ["diff", "verify"]

_SHOWN = 40


def verify(args: argparse.Namespace) -> int:
    """The action."""
    folder = find_run(args)
    paths = chosen(folder, args.step)
    reasons: dict[str, str | None] = {}
    total = sum(_size_bytes(path) for path in paths)
    with bar("verifying", total, quiet=args.json) as advance:
        for path in paths:
            reasons[path.name] = verify_one(path, folder.run_id, advance)
            if not args.json:
                print(
                    f"{path.name}  " + ("verified" if reasons[path.name] is None else f"unusable: {reasons[path.name]}")
                )
    if args.json:
        print_json([{"name": name, "verified": why is None, "reason": why} for name, why in reasons.items()])
    elif not paths:
        print(f"{folder.run_id} has no checkpoints", file=sys.stderr)
    return 0 if all(why is None for why in reasons.values()) else 1


def _size_bytes(path: Path) -> int:
    try:
        return read_manifest(path).size_bytes
    except CorruptCheckpoint:
        return 0


def diff(args: argparse.Namespace) -> int:
    """The action."""
    one, two = _two(args)
    with bar("comparing", size_bytes(shared(one)), quiet=args.json) as advance:
        found = compare(one, two, advance)
    same = not (any(found.only) or found.reshaped or found.changed)
    names = [f"{each.manifest.identity.run_id} step {each.step}" for each in (one, two)]
    if args.json:
        print_json(_document(names, found, same))
    else:
        _print(names, found)
    return 0 if same else 1


def _two(args: argparse.Namespace) -> tuple[Opened, Opened]:
    steps = args.step or []
    if len(steps) > 2:
        raise UsageError(f"--step: {len(steps)} steps were given; two checkpoints are compared")
    folder = find_run(args)
    if args.other is not None:
        other = find_run(args, args.other)
        first, second = (steps[0], steps[-1]) if steps else (None, None)
        return open_chosen(folder, first), open_chosen(other, second)
    if len(steps) != 2:
        raise UsageError(f"{folder.run_id}: which two checkpoints? give --step A B, or a second run")
    return open_chosen(folder, steps[0]), open_chosen(folder, steps[1])


def _document(names: list[str], found: Comparison, same: bool) -> dict[str, Any]:
    return {
        "first": names[0],
        "second": names[1],
        "same": same,
        "equal": found.equal,
        "only_first": found.only[0],
        "only_second": found.only[1],
        "reshaped": [{"name": name, "first": first, "second": second} for name, first, second in found.reshaped],
        "changed": [
            {"name": each.name, "dtype": each.dtype, "elements": each.elements, **asdict(each.difference)}
            for each in found.changed
        ],
        "read_bytes": found.read_bytes,
    }


def _print(names: list[str], found: Comparison) -> None:
    lines = [f"{name}  only in {where}" for where, only in zip(names, found.only, strict=True) for name in only]
    lines += [f"{name}  {first}, then {second}" for name, first, second in found.reshaped]
    lines += [_line(each) for each in sorted(found.changed, key=lambda each: -(each.difference.max_abs or 0.0))]
    print("\n".join(lines[:_SHOWN]), end="\n" if lines else "")
    if len(lines) > _SHOWN:
        print(f"and {len(lines) - _SHOWN} more; --json has all")
    read = format_size(found.read_bytes)
    print(f"{found.equal} tensors equal, {len(lines)} differ; {read} of each were read, checksums told the rest")


def _line(each: Changed) -> str:
    found = each.difference
    parts = [f"{each.name}  {found.differing} of {each.elements} differ"]
    if found.max_abs is not None and found.max_rel is not None:
        parts.append(f"by {found.max_abs:.3g} at most, relatively {found.max_rel:.3g}")
    if found.not_finite:
        parts.append(f"{found.not_finite} with no finite distance")
    return ", ".join(parts)
