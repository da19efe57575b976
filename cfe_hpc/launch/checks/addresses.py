"""Checks of ports and addresses: can figures leave the nodes, and do passwords stay unread on the way?"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts

__all__ = [
    "gateway_loopback",
    "gateway_password",
    "metrics_package",
    "not_yet",
    "port_ephemeral",
    "port_privileged",
    "port_taken",
]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PRIVILEGED = 1024
_LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def port_privileged(facts: Facts) -> Iterator[Problem]:
    port = facts.job.metrics.port
    if port is not None and port < _PRIVILEGED:
        remedy = "choose one above, for example 9464"
        yield facts.problem(
            "job.metrics.port", f"only root may open ports below {_PRIVILEGED}: nobody could scrape it", remedy, port
        )


def port_taken(facts: Facts) -> Iterator[Problem]:
    port = facts.job.metrics.port
    if facts.on_slurm or port is None or port < _PRIVILEGED:
        return
    # Every address, as rank 0 will; reused as servers do, so that a connection that lingers is no reason.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            what = f"cannot be opened on this machine now: {error.strerror}"
            yield facts.problem("job.metrics.port", what, "choose another, or end what has it", port)


def port_ephemeral(facts: Facts) -> Iterator[Problem]:
    port = facts.job.metrics.port
    try:
        first, last = map(int, _LOCAL_PORTS.read_text().split())
    except (OSError, ValueError):  # no Linux, or none that tells
        return
    if port is not None and first <= port <= last:
        what = f"connections going out take ports from {first} to {last}, and may have it first"
        yield facts.problem("job.metrics.port", what, f"choose one below {first}, for example 9464", port)


def metrics_package(facts: Facts) -> Iterator[Problem]:
    metrics = facts.job.metrics
    wanted = next((key for key in ("pushgateway", "port") if getattr(metrics, key) is not None), None)
    if wanted is not None and facts.job.environment.is_ours and find_spec("prometheus_client") is None:
        what = "prometheus_client is not installed: no figure would leave the run folder"
        yield facts.problem(f"job.metrics.{wanted}", what, 'pip install "cfe-hpc[train]"', getattr(metrics, wanted))


def gateway_loopback(facts: Facts) -> Iterator[Problem]:
    url = facts.job.metrics.pushgateway
    if facts.on_slurm and url is not None and urlsplit(url).hostname in _LOOPBACK:
        what = "is each machine's own address: rank 0 would look for the gateway on its node"
        yield facts.problem("job.metrics.pushgateway", what, "name the gateway's host as nodes see it", url)


def gateway_password(facts: Facts) -> Iterator[Problem]:
    url = facts.job.metrics.pushgateway
    given = any(os.environ.get(f"CFE_PUSHGATEWAY_PASSWORD{end}") for end in ("", "_FILE"))
    if url is None or not given:
        return
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        what = "the gateway's password would cross the network for all to read"
        yield facts.problem("job.metrics.pushgateway", what, "use https://, or unset CFE_PUSHGATEWAY_PASSWORD", url)


def not_yet(facts: Facts) -> Iterator[Problem]:
    endpoint = facts.job.metrics.otlp_endpoint
    if endpoint is not None:
        what, remedy = "this version does not export OpenTelemetry", "use pushgateway or port"
        yield facts.problem("job.metrics.otlp_endpoint", what, remedy, endpoint)
