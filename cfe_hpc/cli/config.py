"""`config show JOB`: a job as resolved from all its layers. `config precedence`: what the layers are. `config schema`:
what files may hold, for editors."""

from __future__ import annotations

import argparse

from cfe_hpc.cli import common

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = "Show what a job comes to once its layers are laid over one another."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="a job as resolved, as TOML", allow_abbrev=False)
    show.description = "Print a job as resolved, every key spelt out, as TOML."
    common.add_job_arguments(show)
    show.add_argument("--origin", action="store_true", help="end every line with where its value came from")
    common.add_json_argument(show)
    precedence = actions.add_parser("precedence", help="the layers, in order, and the variables", allow_abbrev=False)
    precedence.description = "Print the layers of a job's values, each winning over those before it."
    common.add_json_argument(precedence)
    schema = actions.add_parser("schema", help="the JSON Schema of job files or site profiles", allow_abbrev=False)
    schema.description = "Print the JSON Schema of job files or site profiles: editors complete and check TOML by it."
    schema.add_argument("kind", choices=["job", "site"], help="of which files")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    action = {"show": _show, "precedence": _precedence, "schema": _schema}[args.action]
    return action(args)


def _show(args: argparse.Namespace) -> int:
    from cfe_hpc.config.show import toml_lines

    loaded = common.load_job(args)
    if args.json:
        job = loaded.job.model_dump(mode="python", by_alias=True)
        site = loaded.site.model_dump(mode="python", by_alias=True)
        common.print_json({"job": job, "site": site, "origins": dict(loaded.origins)})
        return 0
    remark = (lambda key: loaded.origins.get(f"job.{key}", "default")) if args.origin else None
    print(f"# {loaded.job_file} for site {loaded.site.name} ({loaded.site_file})")
    print("\n".join(toml_lines(loaded.job, remark)))
    return 0


def _precedence(args: argparse.Namespace) -> int:
    from cfe_hpc.config.environment import HONOURED
    from cfe_hpc.config.load import PRECEDENCE

    if args.json:
        common.print_json({"layers": [name for name, _ in PRECEDENCE], "variables": HONOURED})
        return 0
    for number, (name, meaning) in enumerate(PRECEDENCE, start=1):
        print(f"{number}. {name:<18}  {meaning}")
    print("\nVariables of the CFE_* layer:")
    for name, meaning in HONOURED.items():
        print(f"  {name:<18}  {meaning}")
    return 0


def _schema(args: argparse.Namespace) -> int:
    from cfe_hpc.config.schema import schema_text

    print(schema_text(args.kind), end="")
    return 0
