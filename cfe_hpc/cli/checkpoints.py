"""`checkpoints ls|verify|prune|pin|export|diff`: what a run has saved, whether it is whole, and what may go."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from cfe_hpc.cli.common import add_json_argument, add_run_argument
from cfe_hpc.errors import UsageError
from cfe_hpc.units import parse_size_bytes

__all__ = ["configure", "run"]

_MODULES = {
    "ls": "checkpoints_ls",
    "verify": "checkpoints_read",
    "diff": "checkpoints_read",
    "prune": "checkpoints_keep",
    "pin": "checkpoints_keep",
    "export": "checkpoints_export",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all actions."""
    parser.description = "List, verify, compare, prune, pin and export a run's checkpoints."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    ls = _action(actions, "ls", "the checkpoints of a run, the newest first; their bytes are not read")
    ls.add_argument(
        "--tensors", action="store_true", help="the tensors of one checkpoint, the newest unless --step names another"
    )
    verify = _action(actions, "verify", "read every byte and compare it with its checksum; exit 1 when any differs")
    _configure_prune(_action(actions, "prune", "delete what the job's policy does not keep, as a running job would"))
    pin = _action(actions, "pin", "keep a checkpoint whatever the job's policy says")
    pin.add_argument("--step", metavar="N", type=int, required=True, help="the checkpoint of this step")
    pin.add_argument("--note", metavar="TEXT", help="why; `ls` shows it")
    pin.add_argument("--unpin", action="store_true", help="leave it to the policy again, that of an epoch's end, too")
    export = _action(actions, "export", "write whole tensors, whichever ranks hold them, as safetensors")
    _configure_export(export)
    diff = _action(actions, "diff", "compare two checkpoints tensor by tensor; exit 1 when they differ")
    diff.add_argument("other", metavar="RUN2", nargs="?", help="another run; the same one when left out")
    diff.add_argument(
        "--step",
        metavar="N",
        type=int,
        nargs="+",
        help="two steps, or one step of two runs; the newest of each run if left out",
    )
    for each, otherwise in ((ls, "all"), (verify, "all"), (export, "the newest")):
        each.add_argument("--step", metavar="N", type=int, help=f"the checkpoint of this step; {otherwise} if left out")


def _configure_prune(prune: argparse.ArgumentParser) -> None:
    prune.add_argument("--keep-last", metavar="N", type=_positive, help="instead of the job's keep_last")
    prune.add_argument("--keep-every-steps", metavar="N", type=_positive, help="instead of the job's keep_every_steps")
    prune.add_argument("--keep-best", metavar="NAME:min|max", type=_best_rule, help="instead of the job's keep_best")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted, and why the others stay")


def _configure_export(export: argparse.ArgumentParser) -> None:
    export.add_argument(
        "file", metavar="FILE", type=Path, nargs="?", help="the file to write, or to replace; with --format hf a folder"
    )
    export.add_argument(
        "--epochs",
        action="store_true",
        help="the weights of every epoch's checkpoint, to exports/ in the run folder; files that are there stay",
    )
    export.add_argument(
        "--weights", action="store_true", help="the model's parameters and buffers alone, by their plain names"
    )
    export.add_argument(
        "--object", metavar="NAME", help="the tracked object whose weights are meant, where there are several"
    )
    export.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help='only tensors whose names match, e.g. "model/*"; may be given again',
    )
    export.add_argument("--dtype", choices=("fp32", "bf16"), help="convert floating-point numbers of 16 and 32 bits")
    export.add_argument(
        "--format", choices=("safetensors", "hf"), default="safetensors", help="one file, or Hugging Face's layout"
    )
    export.add_argument(
        "--max-shard-size", metavar="SIZE", type=_size, default=_size("5GB"), help="of a file of --format hf (5GB)"
    )


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


def _size(text: str) -> int:
    try:
        value = parse_size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no size for a file")
    return value


def _best_rule(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w./-]*:(min|max)", text):
        raise argparse.ArgumentTypeError(f'{text} is not like "val_loss:min"')
    return text


def run(args: argparse.Namespace) -> int:
    """Do the action on one run's checkpoints."""
    module = import_module(f"cfe_hpc.cli.{_MODULES[args.action]}")
    act: Callable[[argparse.Namespace], int] = getattr(module, args.action)
    try:
        return act(args)
    except PermissionError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; the run is another user's") from error
