"""Command lines of the launchers that start the ranks of a node: one agent a node gives one of them.

Neither reads a host list or opens a connection to another node's shell: the scheduler has started an agent on each.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from cfe_hpc.config.run import RunSpec
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.rendezvous import Meeting

__all__ = ["launch_words", "shutdown_timeout_s"]

_SLACK_S = 60
"""Slurm looks for preempted jobs whose grace is over every 30 s, and sends its signals up to 60 s early."""

_HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def shutdown_timeout_s(spec: RunSpec) -> int:
    """Seconds that a launcher must leave its ranks between a stop signal and SIGKILL: what this site may leave them."""
    plan = spec.plan
    return math.ceil(max(plan.preemption.grace, plan.signal_lead_s) + spec.site.slurm.kill_wait + _SLACK_S)


def launch_words(
    spec: RunSpec, facts: RankFacts, meeting: Meeting, environ: Mapping[str, str], *, scratch: Path
) -> list[str]:
    """What starts this node's ranks: each becomes `cfe_hpc.ranks.shim`.

    Args:
        facts: the agent's: its rank is the node's, its world the nodes.
        environ: tells which devices this job has here.
        scratch: folder on this node for what the launcher keeps beside its ranks' logs.
    """
    by_torchrun = spec.plan.launcher == "torchrun"
    words = _torchrun(spec, facts, meeting, scratch) if by_torchrun else _deepspeed(spec, facts, meeting, environ)
    return [*words, spec.provenance.python, "-u", "-m", "cfe_hpc.ranks.shim"]


def _torchrun(spec: RunSpec, facts: RankFacts, meeting: Meeting, scratch: Path) -> list[str]:
    # Static, also with restarts: c10d would number the nodes by their addresses, and rank 0 might be anywhere.
    words = [spec.provenance.python, "-m", "torch.distributed.run"]
    words += [f"--nnodes={facts.num_nodes}", f"--nproc-per-node={spec.plan.devices_per_node}"]
    words += [f"--node-rank={facts.node_rank}", f"--master-addr={meeting.address}"]
    words += [f"--master-port={meeting.master_port}", f"--max-restarts={spec.plan.restarts}"]
    # Without a folder of its own it leaves one behind in /tmp, each time.
    wanted = {"--log-dir": str(scratch), "--signals-to-handle": _HANDLED}
    wanted["--shutdown-timeout"] = str(shutdown_timeout_s(spec))
    known = _torchrun_options()
    words += [f"{option}={value}" for option, value in wanted.items() if option in known]
    return [*words, "--no-python"]


def _torchrun_options() -> frozenset[str]:
    """Options of the torchrun that is installed here: older ones lack some. Without loading torch."""
    found = find_spec("torch")
    folders = () if found is None or found.submodule_search_locations is None else found.submodule_search_locations
    sources = [Path(folder) / "distributed" / "run.py" for folder in folders]
    texts = [source.read_text(encoding="utf-8") for source in sources if source.exists()]
    return frozenset(re.findall(r'"(--[a-z-]+)"', "".join(texts)))


def _deepspeed(spec: RunSpec, facts: RankFacts, meeting: Meeting, environ: Mapping[str, str]) -> list[str]:
    devices = _visible_devices(environ, spec.plan.devices_per_node)
    # By number, not by name: a name may stand there twice where several nodes are on one host.
    world = {f"node{number}": devices for number in range(facts.num_nodes)}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    words = [spec.provenance.python, "-m", "deepspeed.launcher.launch", f"--world_info={encoded}"]
    words += [f"--node_rank={facts.node_rank}", f"--master_addr={meeting.address}"]
    return [*words, f"--master_port={meeting.master_port}", "--no_local_rank", "--no_python"]


def _visible_devices(environ: Mapping[str, str], count: int) -> list[int]:
    """Numbers of this node's devices that are the job's: the launcher writes them into CUDA_VISIBLE_DEVICES anew."""
    given = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(given) >= count and all(number.strip().isdecimal() for number in given):
        return [int(number) for number in given[:count]]
    return list(range(count))
