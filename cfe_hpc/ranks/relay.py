"""`python -m cfe_hpc.ranks.relay`: runs Slurm's commands for ranks in a container, which has none of them.

The batch script starts it outside of the container and evaluates what it prints. It serves this machine alone, and
those who know the token. Rank 0, which asks, is on the batch script's node.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socketserver
import sys
import threading
import time
from typing import Any

from cfe_hpc.process import RELAYED, CommandError, run
from cfe_hpc.ranks.successor import clean_environment

__all__ = ["main", "serve"]

_POLL_S = 1.0


class _Handler(socketserver.StreamRequestHandler):
    """One command."""

    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        asked = json.loads(self.rfile.readline())
        if not secrets.compare_digest(str(asked.get("token")), self.server.token):
            return
        self.wfile.write(json.dumps(_answer(asked)).encode() + b"\n")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = secrets.token_hex(16)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    argv = [str(word) for word in asked["argv"]]
    if argv[0] not in RELAYED:
        return {"error": f"{argv[0]}: is no command of Slurm's"}
    environment = None
    if asked["attempt_base"] is not None:
        # Of this side, not of the container's: a job that is sent from there starts outside.
        environment = clean_environment(os.environ) | {"CFE_ATTEMPT_BASE": str(asked["attempt_base"])}
    try:
        done = run(argv, timeout_s=float(asked["timeout_s"]), check=False, stdin=asked["stdin"], env=environment)
    except CommandError as error:
        return {"error": str(error)}
    return {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def serve(parent: int) -> tuple[str, int]:
    """Serve from a process of its own, until process `parent` has ended; (what CFE_RELAY must say, its process id)."""
    server = _Server()
    pid = os.fork()
    if pid:
        server.server_close()
        return f"{server.server_address[1]}:{server.token}", pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # it is when a job is being ended that ranks have something to ask
    with open(os.devnull, "r+b") as nothing:
        for stream in (0, 1, 2):  # what reads the first line waits for the end of it
            os.dup2(nothing.fileno(), stream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.path.exists(f"/proc/{parent}"):
        time.sleep(_POLL_S)
    os._exit(0)


def main() -> int:
    """The module's command line: prints lines for the shell that called it."""
    os.environ.pop("CFE_RELAY", None)
    relay, pid = serve(os.getppid())
    print(f"export CFE_RELAY={shlex.quote(relay)} CFE_RELAY_PID={pid}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
