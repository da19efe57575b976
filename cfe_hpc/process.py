"""The one door to other programs: argument lists, a time limit, and an error that says what failed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfe_hpc.errors import CfeError

__all__ = ["RELAYED", "CommandError", "Completed", "run", "start_ticks"]

RELAYED = frozenset({"sacct", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "sstat"})
"""Slurm's commands: run outside of a container where CFE_RELAY says who does it (`ranks.relay`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """What a program left behind: its exit status and its two texts."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


class CommandError(CfeError):
    """A program is missing, failed, or ran past its time limit. `completed` is None unless it ran to its end."""

    def __init__(self, message: str, completed: Completed | None = None) -> None:
        super().__init__(message)
        self.completed = completed


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    check: bool = True,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program to its end without a shell and return what it printed.

    Args:
        argv: the program and its arguments, one item each.
        timeout_s: seconds until it is killed.
        check: raise when it exits with another status than 0.
        stdin: text for its standard input; nothing (an empty file) when None.
        env: the whole environment; this process's own when None.

    Raises:
        CommandError: it could not be started, ran too long, or (with check) exited with another status than 0.
    """
    shown = " ".join(argv[:4]) + (" …" if len(argv) > 4 else "")
    relay = os.environ.get("CFE_RELAY") if argv[0] in RELAYED else None
    if relay is not None:
        completed = _relayed(relay, argv, timeout_s, stdin, env)
    else:
        completed = _run(argv, shown, timeout_s, stdin, cwd, env)
    if check and completed.returncode != 0:
        said = (completed.stderr.strip() or completed.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise CommandError(f"`{shown}` failed with exit status {completed.returncode}: {said}", completed)
    return completed


def _run(
    argv: Sequence[str],
    shown: str,
    timeout_s: float,
    stdin: str | None,
    cwd: Path | None,
    env: Mapping[str, str] | None,
) -> Completed:
    try:
        done = subprocess.run(
            list(argv),
            input=stdin if stdin is not None else "",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            cwd=cwd,
            env=None if env is None else dict(env),
            check=False,
        )
    except FileNotFoundError as error:
        raise CommandError(f"{argv[0]}: command not found") from error
    except OSError as error:
        raise CommandError(f"{argv[0]}: cannot be started ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"`{shown}` gave no answer within {timeout_s:g} s") from error
    return Completed(argv=tuple(argv), returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)


def _relayed(
    relay: str, argv: Sequence[str], timeout_s: float, stdin: str | None, env: Mapping[str, str] | None
) -> Completed:
    """Have it run outside of the container. Of `env` the number of the attempt counts there, and nothing else."""
    port, _, token = relay.partition(":")
    base = None if env is None else env.get("CFE_ATTEMPT_BASE", "0")
    asked = {"token": token, "argv": list(argv), "timeout_s": timeout_s, "stdin": stdin, "attempt_base": base}
    try:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=timeout_s + 5.0) as connection:
            connection.sendall(json.dumps(asked).encode() + b"\n")
            with connection.makefile("rb") as stream:
                answer = json.loads(stream.readline())
    except (OSError, ValueError) as error:
        what = f"{argv[0]}: cannot be asked for outside of the container ({error}); is this rank 0's node?"
        raise CommandError(what) from error
    if "error" in answer:
        raise CommandError(str(answer["error"]))
    return Completed(
        argv=tuple(argv), returncode=answer["returncode"], stdout=answer["stdout"], stderr=answer["stderr"]
    )


def start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None when there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in ("Z", "X") else int(fields[19])
