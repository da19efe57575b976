"""From a bare process to a rank that knows its place, its peers and its device."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from importlib import import_module

from cfe_hpc import log
from cfe_hpc.checkpoints.protocols import Group
from cfe_hpc.config.run import RunSpec
from cfe_hpc.devices.base import Device
from cfe_hpc.devices.resolve import DEVICES, resolve
from cfe_hpc.errors import ImpossibleError
from cfe_hpc.ranks import control
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.rendezvous import Meeting, await_listener, meet

__all__ = ["Place", "bootstrap", "rank_environment", "rank_variables"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this rank stands: its facts, its device, and the group of all ranks.

    Attributes:
        device_error: why the device is not to be used; ranks.preflight tells the other ranks, and raises it.
    """

    facts: RankFacts
    meeting: Meeting
    device: Device
    group: Group
    device_error: Exception | None = None

    def init_process_group(self) -> None:
        """Start torch.distributed's default group with the device's backend. Collective."""
        if self.facts.rank:
            await_listener(self.meeting.address, self.meeting.master_port)
        self.device.init_process_group(self.facts)


def rank_variables(facts: RankFacts) -> dict[str, str]:
    """The variables that tell this rank's place alone."""
    return {
        "RANK": str(facts.rank),
        "LOCAL_RANK": str(facts.local_rank),
        "WORLD_SIZE": str(facts.world_size),
        "LOCAL_WORLD_SIZE": str(facts.local_world_size),
        "NODE_RANK": str(facts.node_rank),
    }


def rank_environment(facts: RankFacts, meeting: Meeting, spec: RunSpec) -> dict[str, str]:
    """The variables that torch.distributed, DeepSpeed and collective libraries read, for this rank."""
    variables = {
        **rank_variables(facts),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.master_port),
        "CFE_CONTROL_PORT": str(meeting.control_port),
    }
    interface = spec.site.network.interface
    if interface and facts.num_nodes > 1:
        variables.update(dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"), interface))
    return variables


def bootstrap(facts: RankFacts, spec: RunSpec, environ: MutableMapping[str, str] | None = None) -> Place:
    """Meet the other ranks, choose the device, set the environment. Collective: every rank calls it once.

    A device that is not there does not keep this rank from the others: they would wait for it. It is left to
    ranks.preflight.

    Side effects: changes the environment (os.environ unless given) and configures this package's log. Loads torch
    only for a run of several ranks.
    """
    env = os.environ if environ is None else environ
    log.configure(rank=facts.rank)
    device, reason, missing = _choose(facts, spec, env)
    with _loading_torch(facts):
        meeting = _inherited(env) or meet(facts, token=spec.run_id)
    env.update(rank_environment(facts, meeting, spec))
    group = control.connect(facts, meeting)
    if missing is None:
        try:
            device.activate(facts.local_rank)
        except (ImpossibleError, ImportError, RuntimeError) as error:
            missing = error
    logger.info(
        "rank %d of %d on %s (attempt %d, job %s); device %s: %s",
        facts.rank,
        facts.world_size,
        socket.gethostname(),
        facts.attempt,
        facts.job_id,
        device.name,
        reason,
    )
    return Place(facts=facts, meeting=meeting, device=device, group=group, device_error=missing)


@contextlib.contextmanager
def _loading_torch(facts: RankFacts) -> Iterator[None]:
    """Have torch loaded while the body runs, for a run of several ranks: it takes seconds, and the body waits.

    The body must leave the environment alone: C code reads it meanwhile, without a lock.
    """

    def load() -> None:
        with contextlib.suppress(Exception):  # told where it is needed
            import_module("torch")

    if facts.world_size == 1 or "torch" in sys.modules:
        yield
        return
    thread = threading.Thread(target=load, name="cfe-load-torch")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _choose(facts: RankFacts, spec: RunSpec, env: MutableMapping[str, str]) -> tuple[Device, str, Exception | None]:
    """(the device, why this one, why it is not to be used); its variables are set before torch is loaded."""
    wanted = spec.plan.accelerator
    try:
        choice = resolve(wanted)
    except ImpossibleError as error:
        return DEVICES[wanted](), "asked for by the job's plan, and not there", error
    try:
        env.update(choice.device.environment(facts))
    except ImpossibleError as error:
        return choice.device, choice.reason, error
    return choice.device, choice.reason, None


def _inherited(env: MutableMapping[str, str]) -> Meeting | None:
    """The meeting that a `command` job's wrapper has arranged for its child."""
    if "CFE_CONTROL_PORT" not in env:
        return None
    return Meeting(
        address=env["MASTER_ADDR"],
        master_port=int(env["MASTER_PORT"]),
        control_port=int(env["CFE_CONTROL_PORT"]),
    )
