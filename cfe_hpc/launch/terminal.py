"""A program that has this terminal until it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from threading import Thread
from types import FrameType

from cfe_hpc.errors import SchedulerError
from cfe_hpc.ranks.child import die_with_parent

__all__ = ["in_terminal"]

_END_S = 10.0
"""For a program that is told to end, until it is killed."""


class _Told(Exception):
    """This process is told to end: by `cancel RUN`, or by a terminal that has gone."""


def in_terminal(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    heard: Callable[[str], None] | None = None,
    given_up: Callable[[], bool] | None = None,
) -> int:
    """Run a program in this terminal to its end; its status as the shell tells it. Ctrl-C is for it alone.

    When this process is told to end (TERM, or HUP of a terminal that has gone) the program ends first.

    Args:
        heard: gets each line of the program's standard error, from a thread; they are shown all the same.
        given_up: whether Ctrl-C means that the program is to end. Asked a while after each one: a program that has
            not ended by then is ended.

    Raises:
        SchedulerError: there is no such program.
    """

    def told(signum: int, frame: FrameType | None) -> None:
        raise _Told

    def interrupted(signum: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _END_S)

    def waited(signum: int, frame: FrameType | None) -> None:
        if given_up is not None and given_up():
            raise _Told

    handlers = {signal.SIGTERM: told, signal.SIGHUP: told, signal.SIGINT: interrupted, signal.SIGALRM: waited}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    program = None
    try:
        stderr = None if heard is None else subprocess.PIPE
        program = subprocess.Popen(list(argv), env=dict(environment), stderr=stderr, preexec_fn=_hear_again)
        if heard is not None:
            Thread(target=_listen, args=(program, heard), name="cfe-listen", daemon=True).start()
        status = program.wait()
    except _Told:
        status = -signal.SIGTERM if program is None else _end(program)
    except FileNotFoundError:
        raise SchedulerError(
            f"{argv[0]}: command not found; debug from a machine that has Slurm's commands, or use --site local"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, earlier in before.items():
            signal.signal(number, earlier)
    return 128 - status if status < 0 else status


def _listen(program: subprocess.Popen[bytes], heard: Callable[[str], None]) -> None:
    assert program.stderr is not None
    for line in program.stderr:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        heard(line.decode(errors="replace"))


def _hear_again() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent()


def _end(program: subprocess.Popen[bytes]) -> int:
    program.terminate()
    try:
        return program.wait(_END_S)
    except subprocess.TimeoutExpired:
        program.kill()  # what it has started dies with it
        return program.wait()
