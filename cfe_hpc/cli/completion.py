"""`completion bash|zsh`, and the answers to the shell: verbs, options, and the names that there are.

argcomplete asks this very program at each TAB: only it knows the runs, jobs and sites that there are, and the keys
of a job. A script written out once (as shtab does) would know none of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_origin

from cfe_hpc.errors import CfeError

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["answer", "configure", "run"]

_PROGRAM = "cfe-hpc"

Names = Callable[[str, argparse.Namespace], Iterable[str]]
"""From what is written of a word, and of the words before it, to what the word may be."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "Print what a shell needs to complete verbs, options, job names, site names, run ids and keys. In ~/.bashrc: "
        f'eval "$({_PROGRAM} completion bash)"; in ~/.zshrc, after compinit: eval "$({_PROGRAM} completion zsh)".'
    )
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def run(args: argparse.Namespace) -> int:
    """Print the shell's part."""
    from argcomplete.shell_integration import shellcode

    print(shellcode([_PROGRAM], shell=args.shell))
    return 0


def answer() -> None:
    """Answer the shell, and end the process: called when it asks, by the variable _ARGCOMPLETE."""
    import argcomplete

    parser = _parser(os.environ.get("COMP_LINE", "").split())
    argcomplete.autocomplete(parser, always_complete_options=False)


def _parser(words: list[str]) -> argparse.ArgumentParser:
    """All verbs, of which the one that is being written has its arguments."""
    from cfe_hpc.cli.main import VERBS

    parser = argparse.ArgumentParser(prog=_PROGRAM, allow_abbrev=False)
    verbs = parser.add_subparsers(metavar="VERB")
    for verb, (module, line) in VERBS.items():
        sub = verbs.add_parser(verb, help=line, allow_abbrev=False)
        if verb in words[1:2]:
            import_module(f"cfe_hpc.cli.{module}").configure(sub)
            _give_completers(sub)
    return parser


def _give_completers(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in dict.fromkeys(action.choices.values()):
                _give_completers(sub)
            continue
        names = _BY_DEST.get(action.dest) or _BY_METAVAR.get(str(action.metavar))
        if names is not None:
            action.completer = _quietly(names)  # type: ignore[attr-defined]


def _quietly(names: Names) -> Callable[..., list[str]]:
    def completer(prefix: str, parsed_args: argparse.Namespace, **more: object) -> list[str]:
        del more
        try:
            return [name for name in names(prefix, parsed_args) if name.startswith(prefix)]
        except (CfeError, OSError):  # told by the command itself, when it is given
            return []

    return completer


def _jobs(prefix: str, args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.config import shipped

    return [*shipped.available("jobs"), *_toml_files(prefix)]


def _sites(prefix: str, args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.config import shipped

    return [*shipped.available("site_configs"), *_toml_files(prefix)]


def _toml_files(prefix: str) -> Iterator[str]:
    """TOML files, and folders on the way to them: a shell that gets no answer does not offer files by itself in zsh."""
    folder, name = os.path.split(prefix)
    with os.scandir(folder or ".") as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(".") and not name.startswith("."):
                continue
            if entry.is_dir():
                yield f"{path}/"
            elif entry.name.endswith(".toml"):
                yield path


def _runs(prefix: str, args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.reports.find import run_paths, runs_roots

    return (path.rpartition("/")[2] for path in run_paths(runs_roots(getattr(args, "site", None), os.environ)))


def _partitions(prefix: str, args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.config.load import load_site

    return load_site(args.site, os.environ)[0].partitions


def _checks(prefix: str, args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.config.checks import CHECKS

    return CHECKS


def _settings(prefix: str, args: argparse.Namespace) -> Iterator[str]:
    """`KEY=`, or with KEY written out each `KEY=VALUE` where the values are few words."""
    from cfe_hpc.config.job import Job
    from cfe_hpc.config.site import Site

    key, equals, _ = prefix.partition("=")
    if equals:
        model, path = (Site, key[5:]) if key.startswith("site.") else (Job, key)
        yield from (f"{key}={word}" for word in _words_of(model, path))
        return
    yield from (f"{name}=" for name in _keys_of(Job, ""))
    yield from (f"params.{name}=" for name in _params(args.job))
    if key.startswith("s"):  # a hundred more, and seldom meant
        yield from (f"{name}=" for name in _keys_of(Site, "site."))


def _keys_of(model: type[BaseModel], before: str) -> Iterator[str]:
    """The dotted keys of a model; those in tables whose names are the user's own are left out."""
    from cfe_hpc.config.problems import key_of, nested_model

    for name, field in model.model_fields.items():
        table = nested_model(field.annotation)
        key = f"{before}{key_of(name, field)}"
        if table is None:
            yield key
        elif get_origin(field.annotation) is None:
            yield from _keys_of(table, f"{key}.")


def _words_of(model: type[BaseModel], key: str) -> list[str]:
    """The words that may stand at a key; none where anything may."""
    from cfe_hpc.config.problems import field_at, literal_words

    _, field = field_at(model, tuple(key.split(".")))
    if field is None:
        return []
    return ["true", "false"] if field.annotation is bool else [str(word) for word in literal_words(field.annotation)]


def _params(job: str | None) -> Iterable[str]:
    """What the job file itself says under [params]."""
    params = _job_table(job).get("params")
    return params if isinstance(params, dict) else ()


def _stages(prefix: str, args: argparse.Namespace) -> Iterable[str]:
    stages = _job_table(args.job).get("stage")
    named = stages if isinstance(stages, list) else ()
    return [str(stage["name"]) for stage in named if isinstance(stage, dict) and "name" in stage]


def _job_table(job: str | None) -> dict[str, Any]:
    from cfe_hpc.config import shipped
    from cfe_hpc.files import read_toml

    return {} if job is None else read_toml(shipped.resolve(job, "jobs"))


# By what stands in the usage: an argument that a verb gets later is completed, too.
_BY_METAVAR: dict[str, Names] = {
    "JOB": _jobs,
    "S": _sites,
    "NAME": _sites,
    "P": _partitions,
    "RUN": _runs,
    "RUN2": _runs,
    "SWEEP": _runs,
    "KEY=VALUE": _settings,
    "KEY=V1,V2": _settings,
}
_BY_DEST: dict[str, Names] = {"ignore": _checks, "stage": _stages}
