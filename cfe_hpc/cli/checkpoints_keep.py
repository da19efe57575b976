"""`checkpoints prune|pin`: what goes, and what stays whatever the policy says."""

from __future__ import annotations

import argparse

from cfe_hpc.checkpoints import folders
from cfe_hpc.checkpoints.keeping import pins
from cfe_hpc.checkpoints.keeping.rotation import glance, inventory, reasons, rotate
from cfe_hpc.checkpoints.keeping.verified import recall, verify
from cfe_hpc.cli.checkpoints_common import chosen, policy_of, resumed_step
from cfe_hpc.cli.common import find_run, print_json
from cfe_hpc.cli.progress import bar
from cfe_hpc.config.job import Checkpoint
from cfe_hpc.errors import CorruptCheckpoint, UsageError
from cfe_hpc.runfolder import RunFolder

__all__ = ["pin", "prune"]


def prune(args: argparse.Namespace) -> int:
    """The action."""
    folder = find_run(args)
    policy, protected = _policy(args, folder), _protected(args, folder)
    checkpoints = inventory(folder.checkpoints)
    why = reasons(checkpoints, policy, protected)
    superfluous = sorted(step for step, words in why.items() if not words)
    deleted = [] if args.dry_run else rotate(folder.checkpoints, policy, protect=protected)
    kept = {step: words for step, words in sorted(why.items()) if words}
    if args.json:
        print_json({"deleted": deleted, "superfluous": superfluous, "kept": kept})
        return 0
    for step, words in kept.items():
        print(f"step {step} stays: {', '.join(words)}")
    verb = "would delete" if args.dry_run else "deleted"
    print(
        "\n".join(f"{verb} step {step}" for step in (superfluous if args.dry_run else deleted)) or "nothing to delete"
    )
    return 0


def _policy(args: argparse.Namespace, folder: RunFolder) -> Checkpoint:
    asked = {"keep_last": args.keep_last, "keep_every_steps": args.keep_every_steps, "keep_best": args.keep_best}
    return policy_of(folder).model_copy(update={key: value for key, value in asked.items() if value is not None})


def _protected(args: argparse.Namespace, folder: RunFolder) -> dict[int, str]:
    """The newest step that verifies in full, and the one that the last attempt resumed from, and which is which."""
    resumed = resumed_step(folder)
    protected = {} if resumed is None else {resumed: "resumed"}
    for step, path in folders.committed(folder.checkpoints):
        try:
            size_bytes = glance(path, folder.run_id).size_bytes
        except CorruptCheckpoint:
            continue
        outcome = recall(path)
        if outcome is None:
            with bar(f"verifying {path.name}", size_bytes, quiet=args.json) as advance:
                reason = verify(path, folder.run_id, advance)
        else:
            reason = outcome.reason
        if reason is None:
            return {step: "newest verified", **protected}
    return protected


def pin(args: argparse.Namespace) -> int:
    """The action."""
    folder = find_run(args)
    (path,) = chosen(folder, args.step)
    if args.unpin and args.note is not None:
        raise UsageError("--note: says why a checkpoint stays; leave it out with --unpin")
    if args.unpin:
        done = "unpinned" if pins.unpin(path) else "was not pinned"
    else:
        pins.pin(path, folder.run_id, args.note)
        done = "pinned"
    if args.json:
        print_json({"name": path.name, "step": args.step, "pinned": not args.unpin, "note": args.note})
    else:
        print(f"{path.name}  {done}")
    return 0
