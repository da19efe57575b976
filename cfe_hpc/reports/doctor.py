"""What this machine and this cluster can do: one question, one answer, one reason a line. Loads no framework."""

from __future__ import annotations

import base64
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cfe_hpc.config.site import Site, expand_runs_root
from cfe_hpc.devices.probe import probe
from cfe_hpc.errors import ConfigError, SchedulerError
from cfe_hpc.metrics.gateway import check_url, read_credentials
from cfe_hpc.process import CommandError, run
from cfe_hpc.sites.compare import differences
from cfe_hpc.sites.live import read_cluster
from cfe_hpc.units import format_size

__all__ = ["Answer", "examine"]

_COMMAND_TIMEOUT_S = 15.0
_GATEWAY_TIMEOUT_S = 5.0
_SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")

# package: what is not possible without it, for those that only some uses need.
_OPTIONAL = {
    "torch": "training",
    "deepspeed": 'jobs with engine.kind = "deepspeed"',
    "h5py": "data files",
    "numpy": "data files",
    "crc32c": "fast checksums of checkpoints",
    "prometheus_client": "metrics",
}
_REQUIRED = ("pydantic", "submitit", "tomli-w")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One line of the report.

    Attributes:
        topic: python, packages, devices, scheduler, folders, network or metrics.
        can: what is asked, as the thing one wants to do.
        ok: whether it can be done.
        needed: the chosen site's runs depend on it.
        reason: what says so; for a no, what to do.
    """

    topic: str
    can: str
    ok: bool
    needed: bool
    reason: str


def examine(site: Site, environ: Mapping[str, str] | None = None) -> Iterator[Answer]:
    """Every answer, as it is found: some ask the scheduler or the network, and take seconds when it is silent."""
    env = os.environ if environ is None else environ
    yield _python()
    yield from _packages()
    yield from _devices()
    yield from _slurm(site, needed=site.scheduler == "slurm")
    yield _runs_root(site, env)
    yield _port()
    yield _own_name(needed=site.scheduler == "slurm")
    if site.metrics.pushgateway:
        yield _pushgateway(site.metrics.pushgateway, env)


def _python() -> Answer:
    ok = sys.version_info[:2] >= (3, 10)
    reason = f"{platform.python_version()} at {sys.executable}" + ("" if ok else "; use 3.10 or newer")
    return Answer(topic="python", can="run cfe_hpc", ok=ok, needed=True, reason=reason)


def _packages() -> Iterator[Answer]:
    for name in _REQUIRED:
        yield _package(name, can=f"use {name}", needed=True)
    for name, purpose in _OPTIONAL.items():
        yield _package(name, can=f"use {name} ({purpose})", needed=False)


def _package(name: str, *, can: str, needed: bool) -> Answer:
    try:
        return Answer(topic="packages", can=can, ok=True, needed=needed, reason=f"version {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        command = "pip install cfe-hpc" if needed else 'pip install "cfe-hpc[train]", torch first'
        return Answer(topic="packages", can=can, ok=False, needed=needed, reason=f"not installed; {command}")


def _devices() -> Iterator[Answer]:
    tools = {"cuda": ("nvidia-smi", "-L"), "hpu": ("hl-smi", "-L")}
    for name, finding in probe().items():
        reason = finding.evidence
        if name == "cpu":
            reason = f"{len(os.sched_getaffinity(0))} cores for this process"
        elif finding.present:
            reason += f"; {_first_line(tools[name])}"
        yield Answer(topic="devices", can=f"train on {name} here", ok=finding.present, needed=False, reason=reason)


def _first_line(argv: tuple[str, ...]) -> str:
    try:
        printed = run(argv, timeout_s=_COMMAND_TIMEOUT_S).stdout.strip()
    except CommandError as error:
        return str(error)
    return f"{argv[0]} lists {len(printed.splitlines())}, the first: {printed.partition(chr(10))[0].strip()}"


def _slurm(site: Site, *, needed: bool) -> Iterator[Answer]:
    missing = [command for command in _SLURM_COMMANDS if shutil.which(command) is None]
    if missing:
        remedy = "; run this on a login node, or load Slurm's module" if needed else ""
        reason = f"not on PATH: {', '.join(missing)}{remedy}"
        yield Answer(topic="scheduler", can="use Slurm's commands", ok=False, needed=needed, reason=reason)
        return
    found = f"at {Path(shutil.which('sbatch') or '').parent}"
    yield _asked("use Slurm's commands", ("scontrol", "-V"), needed, lambda out: f"{out.strip()} {found}")
    reachable = _asked("reach the controller", ("sinfo", "-h", "-o", "%P %D"), needed, _partitions)
    yield reachable
    if reachable.ok:
        yield _asked(
            "read Slurm's accounting", ("sacctmgr", "-n", "-P", "show", "cluster", "format=cluster"), False, _clusters
        )
        if needed:
            yield _profile(site)


def _profile(site: Site) -> Answer:
    try:
        cluster = read_cluster()
        found = differences(site, cluster)
    except SchedulerError as error:
        return Answer(topic="scheduler", can="trust the profile", ok=False, needed=False, reason=str(error))
    reason = f"nothing in it differs from cluster {cluster.name}, Slurm {cluster.version}"
    if found:
        reason = f"{len(found)} keys differ, {found[0].key} first; `cfe-hpc sites check {site.name}` tells how"
    return Answer(topic="scheduler", can="trust the profile", ok=not found, needed=False, reason=reason)


def _asked(can: str, argv: tuple[str, ...], needed: bool, tell: Callable[[str], str]) -> Answer:
    try:
        printed = run(argv, timeout_s=_COMMAND_TIMEOUT_S).stdout
    except CommandError as error:
        return Answer(topic="scheduler", can=can, ok=False, needed=needed, reason=str(error))
    return Answer(topic="scheduler", can=can, ok=True, needed=needed, reason=tell(printed))


def _partitions(printed: str) -> str:
    names = dict.fromkeys(line.split()[0] for line in printed.splitlines() if line.strip())
    return f"sinfo lists {len(names)} partitions: {', '.join(names)}" if names else "sinfo lists no partition"


def _clusters(printed: str) -> str:
    return f"sacctmgr knows: {', '.join(printed.split())}"


def _runs_root(site: Site, env: Mapping[str, str]) -> Answer:
    can = "write run folders"
    try:
        root = expand_runs_root(site, env)
        # The nearest folder there is: `submit` makes the rest, this looks and leaves nothing behind.
        there = next(folder for folder in (root, *root.parents) if folder.is_dir())
        with tempfile.TemporaryFile(dir=there):
            free = format_size(shutil.disk_usage(there).free)
    except ConfigError as error:
        return Answer(topic="folders", can=can, ok=False, needed=True, reason=str(error))
    except OSError as error:
        reason = f"{root}: {error.strerror}; choose another storage.runs_root"
        return Answer(topic="folders", can=can, ok=False, needed=True, reason=reason)
    shared = "" if site.scheduler == "local" else "; every node must see it under the same path"
    return Answer(topic="folders", can=can, ok=True, needed=True, reason=f"{root}, {free} free{shared}")


def _port() -> Answer:
    can = "open ports for ranks to meet"
    try:
        with socket.socket() as probe_socket:
            probe_socket.bind(("", 0))
            reason = f"port {probe_socket.getsockname()[1]} was free"
    except OSError as error:
        return Answer(topic="network", can=can, ok=False, needed=True, reason=error.strerror or str(error))
    return Answer(topic="network", can=can, ok=True, needed=True, reason=reason)


def _own_name(*, needed: bool) -> Answer:
    can, name = "be found by this machine's name", socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        reason = f"{name} has no address here; other nodes may know it all the same"
        return Answer(topic="network", can=can, ok=False, needed=False, reason=reason)
    loopback = " (loopback: fine on one machine only)" if re.match(r"127\.", address) and needed else ""
    return Answer(topic="network", can=can, ok=True, needed=False, reason=f"{name} is {address}{loopback}")


def _pushgateway(url: str, env: Mapping[str, str]) -> Answer:
    can = "reach the Pushgateway"
    problem = check_url(url, file="site", key="metrics.pushgateway")
    if problem:
        return Answer(topic="metrics", can=can, ok=False, needed=True, reason=str(problem))
    request = urllib.request.Request(f"{url.rstrip('/')}/-/ready")
    try:
        known = read_credentials(env)
        if known is not None:
            token = base64.b64encode(f"{known.user}:{known.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=_GATEWAY_TIMEOUT_S):
            return Answer(topic="metrics", can=can, ok=True, needed=True, reason=f"{url} is ready")
    except ConfigError as error:
        reason = str(error)
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"{url} answers {error.code} {error.reason}"
    except OSError as error:
        reason = f"{url}: {getattr(error, 'reason', error)}; runs train on without it"
    return Answer(topic="metrics", can=can, ok=False, needed=True, reason=reason)
