"""Where ranks meet: rank 0 finds two free ports and tells the others, with no shared file and no fixed port.

Ports are derived from job id and attempt, so that two jobs on one node, or two attempts of one job, do not meet.
A derived port may still be taken: rank 0 walks down a fixed list of candidates until one is free, and the others
walk the same list until someone there knows the password (the run's token). A stranger's listener costs one
candidate, not the attempt.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from cfe_hpc.errors import CfeError
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.patience import PATIENCE_S, insist
from cfe_hpc.ranks.records import record

__all__ = ["Meeting", "await_listener", "candidate_ports", "meet", "reachable_address"]

logger = logging.getLogger(__name__)

# Below Linux's ephemeral range (32768 to 60999), so that no outgoing connection sits on one by chance.
_LOWEST, _HIGHEST = 20_000, 32_767
_CANDIDATES = 16
_REPLY_LIMIT_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ranks of one attempt meet.

    Attributes:
        address: of rank 0's node, as the other nodes reach it.
        master_port: kept free on rank 0's node, by the process that called `meet` there: torch.distributed's.
        control_port: kept free too: the control plane's.
    """

    address: str
    master_port: int
    control_port: int


def candidate_ports(job_id: str, attempt: int, purpose: str) -> Iterator[int]:
    """Ports to try in turn, the same on every rank."""
    for k in range(_CANDIDATES):
        digest = zlib.crc32(f"{purpose}:{job_id}:{attempt}:{k}".encode())
        yield _LOWEST + digest % (_HIGHEST - _LOWEST + 1)


def reachable_address(host: str, *, patience_s: float = PATIENCE_S) -> str:
    """`host`, or the address Slurm knows it by where the name resolves to nothing (node names need not be host names).

    Args:
        patience_s: how long a controller that gives no answer, which may be starting again, is asked anew.

    Raises:
        CfeError: nobody knows the name.
    """
    try:
        socket.getaddrinfo(host, None)
        return host
    except socket.gaierror:
        pass
    argv = ["scontrol", "show", "node", host, "-o"]
    try:
        shown = insist(lambda: run(argv, timeout_s=20), patience_s=patience_s).stdout
    except CommandError as error:
        raise CfeError(f"node {host}: the name does not resolve, and Slurm gives no address ({error})") from error
    address = record(shown).get("NodeAddr")
    if address is None:
        raise CfeError(f"node {host}: the name does not resolve, and `scontrol show node` names no NodeAddr")
    return address


def meet(facts: RankFacts, *, token: str, timeout_s: float = 300.0, control_ports: int = 1) -> Meeting:
    """Agree on where to meet. Collective: every rank calls it once; it returns the same on all.

    Args:
        token: known to this attempt's ranks alone (the run id, say): keeps strangers and other attempts out.
        timeout_s: how long rank 0 waits for the others and they for it.
        control_ports: ports in a row, from the control port on, that must be free.

    Raises:
        CfeError: no candidate port was free, or the others did not appear in time.
    """
    address = "127.0.0.1" if facts.num_nodes == 1 else reachable_address(facts.hosts[0])
    password = f"{token}:{facts.job_id}:{facts.attempt}"
    if facts.rank == 0:
        meeting = Meeting(
            address=address,
            master_port=_free_port(facts, "master"),
            control_port=_free_port(facts, "control", control_ports),
        )
        if facts.world_size > 1:
            _serve(facts, meeting, password, timeout_s)
        return meeting
    return _ask(facts, address, password, timeout_s)


def await_listener(address: str, port: int, *, timeout_s: float = 60.0) -> None:
    """Return when somebody listens there, or when time is up: whoever then connects tells why it cannot.

    torch's store looks again only half a second after it was refused (measured: 0.57 s of a start of 3 s), and ranks
    that load the same things at the same time are mostly a few milliseconds too early.
    """
    deadline, pause_s = time.monotonic() + timeout_s, 0.005
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
            return
        time.sleep(pause_s)
        pause_s = min(0.1, pause_s * 1.3)


def _bind(port: int) -> socket.socket | None:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
        listener.listen(1024)
    except OSError:
        listener.close()
        return None
    return listener


def _keep(port: int) -> int | None:
    """Keep a port from strangers for as long as this process lives; None when it is taken.

    Seconds pass until its server starts, half a minute under a launcher. That server gets it all the same: like all
    that must be able to start again it sets SO_REUSEADDR, and so does this socket, once it is bound; it never listens.
    """
    keeper = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        keeper.bind(("", port))
    except OSError:
        keeper.close()
        return None
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return keeper.detach()


def _free_port(facts: RankFacts, purpose: str, count: int = 1) -> int:
    for port in candidate_ports(facts.job_id, facts.attempt, purpose):
        kept = [_keep(port + k) for k in range(count)]
        if None not in kept:
            return port
        for fd in kept:
            if fd is not None:
                os.close(fd)
    raise CfeError(f"none of {_CANDIDATES} ports for the {purpose} connection is free on this node; requeue the run")


def _serve(facts: RankFacts, meeting: Meeting, password: str, timeout_s: float) -> None:
    """Answer the other ranks on a thread until each has been told, or time is up."""
    for port in candidate_ports(facts.job_id, facts.attempt, "meet"):
        listener = _bind(port)
        if listener is not None:
            break
    else:
        raise CfeError(f"none of {_CANDIDATES} ports to meet at is free on this node; requeue the run")
    reply = (json.dumps(asdict(meeting)) + "\n").encode()

    def answer() -> None:
        deadline, told = time.monotonic() + timeout_s, 0
        with listener:
            while told < facts.world_size - 1 and time.monotonic() < deadline:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(5)
                        if connection.makefile("rb").readline(_REPLY_LIMIT_BYTES).decode().strip() == password:
                            connection.sendall(reply)
                            told += 1

    threading.Thread(target=answer, name="cfe-rendezvous", daemon=True).start()


def _ask(facts: RankFacts, address: str, password: str, timeout_s: float) -> Meeting:
    deadline, pause_s = time.monotonic() + timeout_s, 0.02
    while time.monotonic() < deadline:
        for port in candidate_ports(facts.job_id, facts.attempt, "meet"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                with socket.create_connection((address, port), timeout=5) as connection:
                    connection.sendall(f"{password}\n".encode())
                    line = connection.makefile("rb").readline(_REPLY_LIMIT_BYTES)
                if line:
                    return Meeting(**json.loads(line))
        time.sleep(pause_s)
        pause_s = min(1.0, pause_s * 1.5)
    raise CfeError(
        f"rank {facts.rank} found no rank 0 on {address} within {timeout_s:g} s; "
        "look into rank 0's log, and check that nodes reach each other on ports 20000 to 32767"
    )
