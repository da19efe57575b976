"""`data build` and `data check`: token files of text or arrays, and what is in them."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from cfe_hpc.cli.progress import stages
from cfe_hpc.errors import UsageError
from cfe_hpc.units import format_size, parse_size_bytes

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both actions."""
    parser.description = "Build and check token files: the HDF5 files that training reads."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _configure_build(actions)
    check = actions.add_parser(
        "check", help="verify every byte of a token file and show statistics", allow_abbrev=False
    )
    check.description = (
        "Read every chunk through its checksum, verify hashes and index, show statistics. Exit 1: damaged."
    )
    check.add_argument("file", metavar="FILE", type=Path, help="the token file")
    check.add_argument("--json", action="store_true", help="one JSON document on standard output")


def _configure_build(actions: Any) -> None:
    build = actions.add_parser("build", help="turn text or arrays into one token file", allow_abbrev=False)
    build.description = (
        "Turn text files (bytes become tokens), or arrays of token ids (.npy; .bin of uint16), into one HDF5 file "
        "with a training and a validation split. Options go before or after FILE and SOURCE, not between."
    )
    build.add_argument("file", metavar="FILE", type=Path, help="the token file to write")
    build.add_argument("sources", metavar="SOURCE", type=Path, nargs="*", help="files, or folders searched for files")
    build.add_argument("--stdlib", action="store_true", help="the source code of this Python's standard library")
    build.add_argument("--max-bytes", metavar="SIZE", help="at most this much of --stdlib (default 32MiB)")
    build.add_argument(
        "--include",
        metavar="PATTERN",
        action="append",
        default=[],
        help='only files of folders whose names match, e.g. "*.py"; may be given again',
    )
    build.add_argument("--dtype", choices=("auto", "uint8", "uint16"), default="auto", help="type of the tokens stored")
    build.add_argument(
        "--separator",
        metavar="ID",
        default="auto",
        help="token put after each document: an id, none, or auto, which is 0 for text and none for arrays (default)",
    )
    build.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help="all ids are below N (default: 256 for text, the largest id + 1 for arrays)",
    )
    build.add_argument(
        "--validation", metavar="SHARE", type=float, default=0.05, help="share of documents held out (default 0.05)"
    )
    build.add_argument(
        "--max-document", metavar="N", type=int, default=1 << 16, help="cut longer documents (default 65536 tokens)"
    )
    build.add_argument("--skip-unusable", action="store_true", help="leave out files that are not text, and say so")
    build.add_argument("--force", action="store_true", help="replace FILE if it exists")
    build.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Do the action; 0, or 1 when a checked file is damaged."""
    return _build(args) if args.action == "build" else _check(args)


def _build(args: argparse.Namespace) -> int:
    if args.stdlib == bool(args.sources):
        wrong = "--stdlib and SOURCE exclude each other" if args.stdlib else "no SOURCE"
        raise UsageError(f"data build: {wrong}; name files or folders, or give --stdlib alone")
    if (args.include and args.stdlib) or (args.max_bytes and not args.stdlib):
        raise UsageError("data build: --include is for folders and --max-bytes for --stdlib; leave it out")
    # By dotted name: numpy and h5py are loaded for this verb, never linked to the login side.
    building = import_module("cfe_hpc.data.build")
    options = building.BuildOptions(
        dtype=args.dtype,
        separator=_separator(args.separator),
        vocab_size=args.vocab_size,
        validation_fraction=args.validation,
        max_document_tokens=args.max_document,
        skip_unusable=args.skip_unusable,
        overwrite=args.force,
    )
    with stages(quiet=args.json) as progress:
        if args.stdlib:
            limit = {"max_bytes": _size(args.max_bytes)} if args.max_bytes else {}
            sources = import_module("cfe_hpc.data.sources").stdlib_sources(**limit)
            report = building.build(args.file, sources, options=options, progress=progress)
        else:
            report = building.build_from_paths(
                args.file, args.sources, include=args.include, options=options, progress=progress
            )
    for line in report.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    print(json.dumps(report.as_json()) if args.json else _built(report))
    return 0


def _separator(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--separator: not a token ({text}); give a number, auto or none") from error


def _size(text: str) -> int:
    try:
        return parse_size_bytes(text)
    except ValueError as error:
        raise UsageError(f"--max-bytes: {error} ({text})") from error


def _built(report: Any) -> str:
    lines = [
        f"{report.path}: {format_size(report.size_bytes)}, {report.dtype}, vocabulary {report.vocab_size}, from "
        f"{report.num_sources} files of {format_size(report.source_bytes)}, in {report.seconds:.1f} s"
    ]
    for split, facts in report.splits.items():
        lines.append(f"  {split:<10}  {facts.tokens:>13,} tokens  {facts.documents:>9,} documents")
    return "\n".join(lines)


def _check(args: argparse.Namespace) -> int:
    if not args.file.exists():
        raise UsageError(f"{args.file}: no such file; build it with `cfe-hpc data build`")
    with stages(quiet=args.json, counts=True) as progress:
        report = import_module("cfe_hpc.data.check").check(args.file, progress=progress)
    for line in report.problems:
        print(f"error: {line}", file=sys.stderr)
    if args.json:
        print(json.dumps(report.as_json()))
    elif not report.problems:
        print(_checked(report))
    return 1 if report.problems else 0


def _checked(report: Any) -> str:
    lines = [
        f"{report.path}: good; {format_size(report.size_bytes)}, {report.dtype}, vocabulary {report.vocab_size}, "
        f"from {report.num_sources} files of {format_size(report.source_bytes)}",
        f"  {'split':<10}  {'tokens':>13}  {'share':>6}  {'documents':>9}  {'longest':>8}  {'used':>6}  bits/token",
    ]
    for split, found in report.splits.items():
        lines.append(
            f"  {split:<10}  {found.tokens:>13,}  {found.share:>6.2%}  {found.documents:>9,}  "
            f"{found.longest_document:>8,}  {found.vocab_used:>6,}  {found.entropy_bits:>10.3f}"
        )
    return "\n".join(lines)
