"""`checkpoints ls`: what a run has saved, by whom, in which sizes, and what keeps it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints import marks
from cfe_hpc.checkpoints.keeping.rotation import glance, inventory, reasons
from cfe_hpc.checkpoints.keeping.verified import recall
from cfe_hpc.checkpoints.manifest import Manifest
from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.tiers.places import tiers_of
from cfe_hpc.cli.checkpoints_common import chosen, open_chosen, policy_of, resumed_step
from cfe_hpc.cli.common import find_run, print_json
from cfe_hpc.errors import CorruptCheckpoint
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import format_size

__all__ = ["ls"]


def ls(args: argparse.Namespace) -> int:
    """The action."""
    folder = find_run(args)
    if args.tensors:
        return _list_tensors(args, folder)
    resumed = resumed_step(folder)
    protect = {} if resumed is None else {resumed: "resumed"}
    why = reasons(inventory(folder.checkpoints), policy_of(folder), protect)
    tiers = tiers_of(folder.checkpoints)
    rows = [
        {**row, "tiers": tiers.get(row["step"], ["shared"])} if row["usable"] else row
        for row in (_row(path, folder.run_id, why) for path in chosen(folder, args.step))
    ]
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        print(_text(row) if row["usable"] else f"{row['name']}  unusable: {row['reason']}")
    if not rows:
        print(f"{folder.run_id} has no checkpoints", file=sys.stderr)
    return 0


def _row(path: Path, run_id: str, why: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    try:
        manifest = glance(path, run_id)
    except CorruptCheckpoint as error:
        return {"name": path.name, "path": str(path), "usable": False, "reason": str(error)}
    identity, outcome = manifest.identity, recall(path)
    return {
        "name": path.name,
        "path": str(path),
        "usable": True,
        "step": identity.step,
        "attempt": identity.attempt,
        "world_size": identity.world_size,
        "layout": _layout(manifest),
        "time": manifest.time,
        "size_bytes": manifest.size_bytes,
        "verified": None
        if outcome is None
        else {"good": outcome.reason is None, "time": outcome.time, "reason": outcome.reason},
        "kept_by": list(why.get(identity.step, ())),
        "note": (marks.read(path, "pinned") or {}).get("note"),
        "metrics": {name: value if value - value == 0 else str(value) for name, value in manifest.metrics.items()},
    }


def _layout(manifest: Manifest) -> dict[str, Any]:
    """How the engine had laid out what it saved: of the first object that says so, else plain torch's."""
    objects = manifest.layout.get("objects")
    said = next((each for each in objects.values() if isinstance(each, dict)), {}) if isinstance(objects, dict) else {}
    return {
        "engine": said.get("engine", "torch"),
        **{key: said[key] for key in ("zero_stage", "precision") if key in said},
    }


def _text(row: Mapping[str, Any]) -> str:
    layout, verified = row["layout"], row["verified"]
    zero = f" ZeRO {layout['zero_stage']}" if layout.get("zero_stage") is not None else ""
    kept = ", ".join(row["kept_by"]) or "nothing"
    parts = [
        row["name"],
        f"attempt {row['attempt']}",
        f"{row['world_size']} rank{'s' if row['world_size'] != 1 else ''}",
        f"{layout['engine']}{zero}",
        format_size(row["size_bytes"]),
        row["time"],
        *([] if row["tiers"] == ["shared"] else [" and ".join(row["tiers"])]),
        _verified_text(verified),
        f"kept by {kept}" + (f" ({row['note']})" if row["note"] else ""),
        *(
            f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in row["metrics"].items()
        ),
    ]
    return "  ".join(parts)


def _verified_text(verified: Mapping[str, Any] | None) -> str:
    if verified is None:
        return "not verified"
    return f"verified {verified['time']}" if verified["good"] else f"DAMAGED: {verified['reason']}"


def _list_tensors(args: argparse.Namespace, folder: RunFolder) -> int:
    opened = open_chosen(folder, args.step)
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
