"""`sites list|show|check|detect`: the site profiles there are, what one says, and what the live cluster says."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfe_hpc.cli import common
from cfe_hpc.errors import UsageError

if TYPE_CHECKING:
    from cfe_hpc.sites.compare import Difference
    from cfe_hpc.sites.live import LiveCluster

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = "Site profiles: one cluster, one TOML file, in ./site_configs or shipped with the package."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every profile that --site reaches by name", allow_abbrev=False)
    listing.description = (
        "Every profile that --site reaches by name: in ./site_configs, and shipped. Untried: from documentation alone, "
        "`sites check` has not been run there."
    )
    common.add_json_argument(listing)
    show = actions.add_parser("show", help="one profile, every key spelt out", allow_abbrev=False)
    show.description = "Print one profile as TOML, every key spelt out."
    show.add_argument("name", metavar="NAME", help="name or path of a profile")
    common.add_json_argument(show)
    check = actions.add_parser("check", help="compare a profile with the live cluster", allow_abbrev=False)
    check.description = (
        "Compare a profile with the cluster that this machine belongs to: preemption, limits, access, nodes, features, "
        "billing, versions. Exit codes: 0 nothing differs, 1 something does, 3 Slurm gives no answer."
    )
    check.add_argument("name", metavar="NAME", nargs="?", help="name or path of a profile; $CFE_SITE when left out")
    common.add_json_argument(check)
    detect = actions.add_parser("detect", help="write a profile of the live cluster", allow_abbrev=False)
    detect.description = (
        "Write a profile of the cluster that this machine belongs to, in TOML. What Slurm does not know is marked "
        "with a question mark."
    )
    detect.add_argument("--name", metavar="N", help="name of the site; the cluster's own when left out")
    detect.add_argument("--output", metavar="FILE", type=Path, help="a new file; standard output when left out")


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    action = {"list": _list, "show": _show, "check": _check, "detect": _detect}[args.action]
    return action(args)


def _list(args: argparse.Namespace) -> int:
    from cfe_hpc.config import shipped

    rows = [_summary(name, str(path), shipped.shown(path)) for name, path in shipped.available("site_configs").items()]
    if args.json:
        common.print_json(rows)
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        untried = " (untried)" if row["scheduler"] == "slurm" and not row["verified"] else ""
        print(f"{row['name']:<{width}}  {row['scheduler'] or 'broken':<6}  {row['description']}{untried}")
    return 0


def _summary(name: str, path: str, shown: str) -> dict[str, Any]:
    from cfe_hpc.config.load import load_site
    from cfe_hpc.errors import ConfigError

    try:
        site, _ = load_site(path)
    except ConfigError as error:
        count = len(error.problems)
        text = f"{count} problem{'s' if count > 1 else ''}: see `cfe-hpc sites show {name}`"
        return {
            "name": name,
            "file": shown,
            "scheduler": None,
            "partitions": [],
            "description": text,
            "verified": False,
        }
    return {
        "name": name,
        "file": shown,
        "scheduler": site.scheduler,
        "partitions": list(site.partitions),
        "description": site.description,
        "verified": site.verified,
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


def _check(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from cfe_hpc.config.load import load_site
    from cfe_hpc.sites.compare import differences, unstated
    from cfe_hpc.sites.live import read_cluster

    site, file = load_site(args.name, os.environ)
    if site.scheduler != "slurm":
        raise UsageError(f"{file}: has no scheduler to ask; name the profile of a cluster, see `cfe-hpc sites list`")
    cluster = read_cluster()
    found, missing = differences(site, cluster), unstated(site, cluster)
    if args.json:
        document: dict[str, Any] = {
            "site": site.name,
            "file": file,
            "cluster": cluster.name,
            "version": cluster.version,
            "differences": [asdict(difference) for difference in found],
            "unstated": missing,
            "qos_refusal": cluster.qos_refusal or None,
        }
        common.print_json(document)
    else:
        _print_check(file, cluster, found, missing)
        if not found and not site.verified:
            print(f"{file}: as you have found it to be so, write verified = true and tested_on into it")
    return 1 if found else 0


def _print_check(file: str, cluster: LiveCluster, found: list[Difference], missing: dict[str, str]) -> None:
    _warn_of_qos(cluster)
    for difference in found:
        there = f"it is {difference.cluster}" if difference.cluster is not None else "the cluster has no such thing"
        print(f"{difference.key}: the profile says {difference.profile}, {there}")
    for key, value in missing.items():
        print(f"{key}: not in the profile; it is {value}")
    count = f"{len(found)} differences" if len(found) != 1 else "1 difference"
    print(f"{file}: {count if found else 'nothing differs'} from cluster {cluster.name}, Slurm {cluster.version}")


def _detect(args: argparse.Namespace) -> int:
    from cfe_hpc.sites.detect import profile_text
    from cfe_hpc.sites.live import read_cluster

    cluster = read_cluster()
    text = profile_text(cluster, args.name)
    _warn_of_qos(cluster)
    if args.output is not None:
        try:
            with open(args.output, "x", encoding="utf-8") as out:
                out.write(text)
        except OSError as error:
            remedy = "name another, or remove it" if isinstance(error, FileExistsError) else "name another"
            raise UsageError(f"--output: {args.output}: {error.strerror}; {remedy}") from error
    if args.output is None:
        sys.stdout.write(text)
    else:
        print(f"{args.output}: cluster {cluster.name}, Slurm {cluster.version}; look at the lines marked with ?")
    return 0


def _warn_of_qos(cluster: LiveCluster) -> None:
    if cluster.qos is None:
        print(f"note: nothing is said of QOS: {cluster.qos_refusal}", file=sys.stderr)
