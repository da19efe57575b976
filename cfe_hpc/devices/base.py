"""What a rank needs of a kind of device, in ten calls. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cfe_hpc.config.job import Accelerator

if TYPE_CHECKING:
    import torch

    from cfe_hpc.checkpoints.protocols import HostCopies

__all__ = ["Device", "Memory", "RankPlace", "thread_limits"]


class RankPlace(Protocol):
    """The part of a rank's facts that devices look at; cfe_hpc.ranks.env.RankFacts has it."""

    @property
    def rank(self) -> int:
        """Global rank."""

    @property
    def local_rank(self) -> int:
        """Rank on this node."""

    @property
    def world_size(self) -> int:
        """Ranks of the attempt."""

    @property
    def local_world_size(self) -> int:
        """Ranks on this node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A device's memory as this process uses it. All zero where the device keeps no such count (cpu)."""

    used_bytes: int
    peak_bytes: int
    limit_bytes: int


class Device(Protocol):
    """A kind of device. Order of calls on a rank: environment, activate, init_process_group, then the others."""

    @property
    def name(self) -> Accelerator:
        """The word of job files, and torch's device type."""

    @property
    def backend(self) -> str:
        """torch.distributed's backend of its collectives."""

    def environment(self, place: RankPlace, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        """Variables to set before a framework is loaded.

        Args:
            environ: the process's environment as the scheduler left it; os.environ when None.

        Returns:
            Only what is to be changed: what the user or the site has set stands.

        Raises:
            ImpossibleError: the devices that the scheduler gave cannot be told apart.
        """

    def activate(self, local_rank: int) -> None:
        """Make this rank's device the current one. Raises ImpossibleError when it is not there."""

    def torch_device(self, local_rank: int) -> str:
        """torch's word for this rank's device, e.g. "cuda:0". Call it after `activate`."""

    def init_process_group(self, place: RankPlace) -> None:
        """Start torch.distributed's default group with `backend`; RANK, MASTER_ADDR … are set. Collective."""

    def synchronize(self) -> None:
        """Return when all work given to the device is done."""

    def mark_step(self) -> None:
        """Close the graph gathered so far; call it after backward and after the optimizer's step. Only a lazy
        device does something here."""

    def copies(self) -> HostCopies | None:
        """What copies tensors of this kind of device into this process's memory while it computes; None when all that
        torch offers is to wait for each of them."""

    def rng_state(self) -> torch.Tensor | None:
        """State of the current device's generator, in host memory; None where it is torch's own CPU generator."""

    def set_rng_state(self, state: torch.Tensor | None) -> None:
        """Take back what `rng_state` gave."""

    def memory(self) -> Memory:
        """The current device's memory."""


def thread_limits(environ: Mapping[str, str]) -> dict[str, str]:
    """OMP_NUM_THREADS for the cores that Slurm gave this task; empty when it is set, or Slurm says nothing.

    Without it every rank of a node starts a thread for each core of the node that it may run on.
    """
    if "OMP_NUM_THREADS" in environ or "SLURM_CPUS_PER_TASK" not in environ:
        return {}
    return {"OMP_NUM_THREADS": environ["SLURM_CPUS_PER_TASK"]}
