"""`sites list|show`: the site profiles there are, and what one says."""

from __future__ import annotations

import argparse
from typing import Any

from cfe_hpc.cli import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = "Site profiles: one cluster, one TOML file, in ./site_configs or shipped with the package."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every profile that --site reaches by name", allow_abbrev=False)
    listing.description = "Every profile that --site reaches by name: in ./site_configs, and shipped."
    common.add_json_argument(listing)
    show = actions.add_parser("show", help="one profile, every key spelt out", allow_abbrev=False)
    show.description = "Print one profile as TOML, every key spelt out."
    show.add_argument("name", metavar="NAME", help="name or path of a profile")
    common.add_json_argument(show)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    return _list(args) if args.action == "list" else _show(args)


def _list(args: argparse.Namespace) -> int:
    from cfe_hpc.config import shipped

    rows = [_summary(name, str(path), shipped.shown(path)) for name, path in shipped.available("site_configs").items()]
    if args.json:
        common.print_json(rows)
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['scheduler'] or 'broken':<6}  {row['description']}")
    return 0


def _summary(name: str, path: str, shown: str) -> dict[str, Any]:
    from cfe_hpc.config.load import load_site
    from cfe_hpc.errors import ConfigError

    try:
        site, _ = load_site(path)
    except ConfigError as error:
        count = len(error.problems)
        text = f"{count} problem{'s' if count > 1 else ''}: see `cfe-hpc sites show {name}`"
        return {"name": name, "file": shown, "scheduler": None, "partitions": [], "description": text}
    return {
        "name": name,
        "file": shown,
        "scheduler": site.scheduler,
        "partitions": list(site.partitions),
        "description": site.description,
    }


def _show(args: argparse.Namespace) -> int:
    from cfe_hpc.config.load import load_site
    from cfe_hpc.config.show import toml_lines

    site, file = load_site(args.name)
    if args.json:
        common.print_json(site.model_dump(mode="python", by_alias=True))
        return 0
    print(f"# {file}")
    print("\n".join(toml_lines(site)))
    return 0
