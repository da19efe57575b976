"""`python -m cfe_hpc.ranks.debugging RUN_DIR [--shell]`: one rank of a `debug` session.

Rank 0 has the terminal: the job's entry, or its Python program, under pdb, or a shell to start it from by hand. The
other ranks run as they do in a job, and end with the session.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from bdb import BdbQuit
from collections.abc import Mapping, Sequence
from pathlib import Path
from pdb import Pdb

from cfe_hpc import log
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError, UsageError
from cfe_hpc.ranks import signals
from cfe_hpc.ranks.child import die_with_parent
from cfe_hpc.ranks.command import command_words, exit_code, program_environment
from cfe_hpc.ranks.env import RankFacts, read_facts
from cfe_hpc.ranks.jobrecords import record_job, records
from cfe_hpc.ranks.redirect import redirect
from cfe_hpc.runfolder import RunFolder

__all__ = ["interactive_shell", "main", "under_debugger"]

_POLL_S = 0.5

# Of the interpreter's options, those that take the next word along.
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


def main(argv: Sequence[str] | None = None) -> int:
    """Be a rank of the session until it ends; returns the exit status."""
    parser = argparse.ArgumentParser(prog="cfe_hpc.ranks.debugging", description="One rank of a debug session.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--shell", action="store_true", help="a shell instead of the debugger")
    args = parser.parse_args(argv)
    folder = RunFolder(args.run_dir)
    spec = RunSpec.read(folder.run_toml)
    os.environ["CFE_RUN_DIR"] = str(folder.path)
    os.chdir(spec.provenance.start_folder)
    facts = read_facts()
    if facts.rank > 0:
        return _beside(folder, facts)
    folder.note("debug-begun", "the debug session has begun")
    # `srun` may have told of it while it waited.
    if not any(job["job_id"] == facts.job_id for job in records(folder, "job")):
        record_job(folder, job_id=facts.job_id, scheduler="slurm", attempt_base=0)
    try:
        return _in_terminal(folder, spec, facts, shell=args.shell)
    except CfeError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    finally:
        folder.note("debug-over", "the debug session is over")


def _in_terminal(folder: RunFolder, spec: RunSpec, facts: RankFacts, *, shell: bool) -> int:
    job = f"job {facts.job_id}, " if facts.job_id else ""
    _say(f"rank {facts.rank} of {facts.world_size} on {socket.gethostname()}, {job}{folder.path}")
    if shell:
        environment = program_environment(folder, spec, facts)
        _say(f"`{_start_words(spec)}` starts this rank; `exit` ends the session")
        return interactive_shell(environment, name=f"{spec.job.name} {facts.rank}/{facts.world_size}")
    if spec.job.command is not None:
        words = under_debugger(command_words(spec))
        return _attend(words, program_environment(folder, spec, facts))
    return _debug_entry(spec)


def _say(text: str) -> None:
    print(f"cfe_hpc: {text}", file=sys.stderr, flush=True)


def _start_words(spec: RunSpec) -> str:
    """What starts this rank, for a shell in its environment."""
    if spec.job.command is not None:
        return shlex.join(command_words(spec))
    return f'{shlex.quote(spec.provenance.python)} -m cfe_hpc.ranks "$CFE_RUN_DIR"'


def under_debugger(command: Sequence[str]) -> list[str]:
    """`command` with its Python program started under pdb.

    Raises:
        UsageError: it starts no Python program by itself.
    """
    rest = iter(range(1, len(command)))
    if re.fullmatch(r"(python|pypy)[\d.]*", Path(command[0]).name):
        for index in rest:
            word = command[index]
            if word == "-m" or not word.startswith("-"):
                return [*command[:index], "-m", "pdb", *command[index:]]
            if word == "-c":
                break
            if word in _WITH_VALUE:
                next(rest, None)
    raise UsageError(f"command: starts no Python program that pdb could hold ({shlex.join(command)}); give --shell")


class _Debugger(Pdb):
    """pdb, where `run` is the entry's argument: pdb's own command of that name, like `restart`, would end the session,
    since what has joined a run cannot join it again."""

    def do_run(self, arg: str) -> None:
        self.default(f"run{arg}")

    def do_restart(self, arg: str) -> None:
        del arg
        self.message("a rank joins its run once: end the session with `q`, and start another")


def _debug_entry(spec: RunSpec) -> int:
    """The job's entry under pdb, stopped at its first line; after an error, in the frame that raised it."""
    from cfe_hpc.ranks.__main__ import find_entry
    from cfe_hpc.ranks.run import join

    signals.install()
    run = join()
    entry = find_entry(spec)
    debugger = _Debugger()
    code = 0
    try:
        debugger.runcall(entry, run)
    except BdbQuit:
        pass
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        traceback.print_exc()
        _say("post-mortem: this is where it was raised; `q` ends the session")
        debugger.reset()
        debugger.interaction(None, error.__traceback__)
        code = 1
    if not run.ended:
        run.abandon()
    return code


def _attend(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program in this terminal to its end; its status. Ctrl-C is for the program alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = subprocess.Popen(list(words), env=dict(environment), preexec_fn=_hear_again)
    except OSError as error:
        raise UsageError(f"{words[0]}: cannot be started: {error.strerror}") from error
    return exit_code(program.wait())


def _hear_again() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signals.unblock()
    die_with_parent()


def interactive_shell(environment: Mapping[str, str], *, name: str) -> int:
    """A shell in this terminal, in this very environment: the user's own start-up files might bring another Python.

    Args:
        name: shown in the prompt.

    Returns:
        The status that the shell ended with.
    """
    prompt = re.sub(r"[\\$`!]", "", name)
    return _attend(["bash", "--noprofile", "--norc", "-i"], {**environment, "PS1": f"({prompt}) \\w$ "})


def _beside(folder: RunFolder, facts: RankFacts) -> int:
    """Run this rank as in a job, and end with the session. Always 0: a rank that fails must not end the session."""
    stem = folder.logs / folder.log_stem(job_id=facts.job_id, attempt=facts.attempt, rank=facts.rank)
    redirect(stem)
    log.configure(rank=facts.rank)
    words = [sys.executable, "-u", "-m", "cfe_hpc.ranks", str(folder.path)]
    rank = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    while rank.poll() is None and folder.promised("debug-over") is None:
        time.sleep(_POLL_S)
    rank.kill()  # it waits for rank 0, which is gone, and has nothing to save
    rank.wait()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of a broken collective would keep the interpreter, and so the session, from ending.
    os._exit(status)
