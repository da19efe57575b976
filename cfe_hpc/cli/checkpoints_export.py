"""`checkpoints export`: tensors for other programs."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cfe_hpc.checkpoints.reader import Opened
from cfe_hpc.checkpoints.state.weights import Source, shared, weights
from cfe_hpc.checkpoints.tools.epochs import export_epochs, of_epochs, total_bytes
from cfe_hpc.checkpoints.tools.export import Written, export_huggingface, export_safetensors, size_bytes
from cfe_hpc.cli.checkpoints_common import open_chosen
from cfe_hpc.cli.common import find_run, print_json
from cfe_hpc.cli.progress import bar
from cfe_hpc.errors import UsageError
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.units import format_size

__all__ = ["export"]


def export(args: argparse.Namespace) -> int:
    """The action."""
    folder = find_run(args)
    if args.epochs:
        return _export_epochs(args, folder)
    if args.file is None:
        raise UsageError("which FILE? name the file to write (or --epochs for one file for each epoch)")
    if args.format == "hf" and args.file.exists() and not (args.file.is_dir() and not any(args.file.iterdir())):
        raise UsageError(f"{args.file}: is there already; name a new folder")
    if args.format != "hf" and args.file.is_dir():
        raise UsageError(f"{args.file}: is a folder; name a file, or give --format hf")
    opened = open_chosen(folder, args.step)
    sources = _sources(args, opened)
    with bar(f"exporting {opened.folder.name}", size_bytes(sources), quiet=args.json) as advance:
        try:
            written = _write(args, opened, sources, advance)
        except OSError as error:
            raise UsageError(f"{args.file}: cannot be written: {error.strerror}") from error
    if args.json:
        facts = {"file": str(args.file), "step": opened.step, "tensors": len(sources)}
        print_json({**facts, "size_bytes": written.size_bytes, "files": list(written.files)})
    else:
        files = f"  {len(written.files)} files" if len(written.files) > 1 else ""
        print(f"{args.file}  step {opened.step}  {len(sources)} tensors  {format_size(written.size_bytes)}{files}")
    return 0


def _sources(args: argparse.Namespace, opened: Opened) -> list[Source]:
    plain = args.weights or args.object is not None or args.format == "hf"
    found = weights(opened, args.object) if plain else shared(opened)
    wanted = [each for each in found if not args.only or any(fnmatchcase(each.name, pattern) for pattern in args.only)]
    if not wanted:
        names = "the weights' plain names" if plain else "`checkpoints ls RUN --tensors`"
        raise UsageError(f"--only: no tensor of {opened.folder.name} matches; see {names}")
    return wanted


def _write(args: argparse.Namespace, opened: Opened, sources: list[Source], advance: Any) -> Written:
    if args.format == "hf":
        size = args.max_shard_size
        return export_huggingface(opened, sources, args.file, shard_bytes=size, dtype=args.dtype, progress=advance)
    return export_safetensors(opened, sources, args.file, dtype=args.dtype, progress=advance)


def _export_epochs(args: argparse.Namespace, folder: RunFolder) -> int:
    given = {"FILE": args.file, "--step": args.step, "--only": args.only, "--weights": args.weights or None}
    wrong = [name for name, value in {**given, "--object": args.object}.items() if value is not None]
    if wrong or args.format == "hf":
        raise UsageError(f"--epochs: leave out {', '.join(wrong) or '--format hf'}: it writes each epoch's weights")
    out, run_id = folder.exports, folder.run_id
    if not of_epochs(folder.checkpoints):
        raise UsageError(
            f"{run_id}: no checkpoint is marked as an epoch's end; set [checkpoint] keep_epochs = true, "
            "and call run.end_epoch(number) in the script"
        )
    with bar("exporting epochs", total_bytes(folder.checkpoints, out, run_id=run_id), quiet=args.json) as advance:
        try:
            made = export_epochs(folder.checkpoints, out, run_id=run_id, dtype=args.dtype, progress=advance)
        except OSError as error:
            raise UsageError(f"{out}: cannot be written: {error.strerror}") from error
    if args.json:
        print_json({"folder": str(out), "files": [path.name for path in made.values()]})
    else:
        print("\n".join(_shown(path) for path in made.values()) or f"every epoch has its file in {out}")
    return 0


def _shown(path: Path) -> str:
    return f"{path}  {format_size(path.stat().st_size)}"
