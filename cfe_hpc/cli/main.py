"""The command line: finds the verb, loads its module alone, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn, Protocol

from cfe_hpc.errors import CfeError, ConfigError, ImpossibleError

__all__ = ["VERBS", "Verb", "main", "script"]

# verb: (module under cfe_hpc.cli, one line for --help). A verb is added by one row and one file.
VERBS: dict[str, tuple[str, str]] = {
    "submit": ("submit", "plan a job, check it, and send it to the scheduler"),
    "check": ("check", "plan and check a job without sending it"),
    "status": ("status", "runs, their states, steps and goodput"),
    "watch": ("watch", "runs, queue and nodes, live in the terminal"),
    "logs": ("logs", "the logs of a run, one rank's or all merged"),
    "report": ("report", "what became of a run, and where its time went"),
    "cancel": ("cancel", "stop a run for good"),
    "requeue": ("requeue", "save a run and put it back in the queue"),
    "retry": ("retry", "send the tasks of a sweep again that failed"),
    "debug": ("debug", "a job's first rank in this terminal, under the debugger or as a shell"),
    "drill": ("drill", "send a run the signals of a preemption, and see whether it survives"),
    "checkpoints": ("checkpoints", "list, verify, compare, prune, pin and export a run's checkpoints"),
    "gc": ("gc", "clean up: plan what old runs may go, and remove it"),
    "data": ("data", "build and check token files"),
    "sites": ("sites", "list and show site profiles, compare one with the cluster, write one"),
    "config": ("config", "show a job as resolved, and where each value came from"),
    "completion": ("completion", "what a shell needs to complete this program's words"),
    "doctor": ("doctor", "what this machine and this cluster can do, and why"),
}


# What no verb expects, and its user can mend.
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "your quota is spent: remove something, or ask your site for more",
    errno.EROFS: "that disk cannot be written: name another folder",
    errno.EACCES: "it is not yours to use: see who owns it",
}


class Verb(Protocol):
    """What a verb's module offers."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments and its description."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the exit code. Raises CfeError for what a user can mend."""


class _Parser(argparse.ArgumentParser):
    """argparse's, telling mistakes in one line, as every other error is told."""

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        wrong, remedy = self._unknown(words) if unknown else (message, "")
        self.exit(2, f"error: {self.prog}: {wrong}; {remedy}see `{self.prog} --help`\n")

    def _unknown(self, words: str) -> tuple[str, str]:
        option = next((word.partition("=")[0] for word in words.split() if word.startswith("-")), None)
        if option is None:
            return f"more words than it takes ({words})", ""
        return f"no such option ({option})", _did_you_mean(option, _options(self))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            remedy = f"{_did_you_mean(str(value), choices)}there are {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"no such choice ({value}); {remedy}")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser, and of its actions."""
    options: list[str] = []
    for action in parser._actions:
        options += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            options += [option for sub in action.choices.values() for option in _options(sub)]
    return options


def _did_you_mean(wrong: str, known: Sequence[str]) -> str:
    from cfe_hpc.config.nearest import nearest  # late: only mistakes need it

    near = nearest(wrong, known)
    return f"did you mean {near}? " if near else ""


def _overview() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    return (
        "usage: cfe-hpc VERB ...\n\n"
        "Train on Slurm clusters: preemptions and time limits cost no step,\n"
        "a dead node those since the last checkpoint.\n\n"
        f"{rows}\n\n"
        "`cfe-hpc VERB --help` tells more of one verb. Exit codes: 0 good, 1 the run or check failed,\n"
        "2 usage or configuration, 3 scheduler unreachable or refused, 4 planned and found impossible.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name; sys.argv's when None.

    Returns:
        The exit code. Errors meant for users go to standard error, one line each, never a traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from cfe_hpc import __version__

        print(f"cfe-hpc {__version__}")
        return 0
    if words[0] not in VERBS:
        hint = f"{_did_you_mean(words[0], list(VERBS))}see `cfe-hpc --help`"
        print(f"error: cfe-hpc: no such verb ({words[0]}); {hint}", file=sys.stderr)
        return 2
    verb: Verb = import_module(f"cfe_hpc.cli.{VERBS[words[0]][0]}")
    parser = _Parser(prog=f"cfe-hpc {words[0]}", allow_abbrev=False)
    verb.configure(parser)
    return _run(verb, parser, words[1:])


def _run(verb: Verb, parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """The verb's exit code, or that of the error it ended with, which is told."""
    try:
        return verb.run(parser.parse_args(words))
    except (ConfigError, ImpossibleError) as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except CfeError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone: that is no error of ours, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; {remedy}", file=sys.stderr)
        return 1


def script() -> NoReturn:
    """The program: `main`, and out.

    The interpreter is not taken apart: freeing every module by hand is a fifth of what `submit` costs (measured: 70 of
    290 ms), and the kernel does it anyway. Verbs close what they open.
    """
    if "_ARGCOMPLETE" in os.environ:
        from cfe_hpc.cli.completion import answer

        answer()
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit as end:  # argparse's
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:
        code = 0
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
