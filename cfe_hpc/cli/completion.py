"""`completion bash|zsh`, and the answers to the shell: verbs, options, and the names that there are.

argcomplete asks this very program at each TAB: only it knows the runs, jobs and sites that there are, and the keys
of a job. A script written out once (as shtab does) would know none of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from importlib import import_module

from cfe_hpc.errors import CfeError

__all__ = ["answer", "configure", "run"]

_PROGRAM = "cfe-hpc"


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
    argcomplete.autocomplete(parser, always_complete_options="long")


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
        elif isinstance(action.metavar, str) and action.metavar in _COMPLETERS:
            action.completer = _quietly(_COMPLETERS[action.metavar])  # type: ignore[attr-defined]


def _quietly(names: Callable[[argparse.Namespace], Iterable[str]]) -> Callable[..., list[str]]:
    def completer(prefix: str, parsed_args: argparse.Namespace, **more: object) -> list[str]:
        del more
        try:
            return [name for name in names(parsed_args) if name.startswith(prefix)]
        except CfeError:  # told by the command itself, when it is given
            return []

    return completer


def _jobs(args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.config import shipped

    return shipped.available("jobs")


def _sites(args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.config import shipped

    return shipped.available("site_configs")


def _runs(args: argparse.Namespace) -> Iterable[str]:
    from cfe_hpc.reports.find import runs_roots, runs_under

    return (run.run_id for run in runs_under(runs_roots(getattr(args, "site", None), os.environ)))


def _keys(args: argparse.Namespace) -> Iterable[str]:
    return ()


# By what stands in the usage: an argument that a verb adds later is completed, too.
_COMPLETERS: dict[str, Callable[[argparse.Namespace], Iterable[str]]] = {
    "JOB": _jobs,
    "S": _sites,
    "NAME": _sites,
    "RUN": _runs,
    "KEY=VALUE": _keys,
}
