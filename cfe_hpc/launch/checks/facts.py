"""What a check looks at, and what it gives back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfe_hpc.config.environment import TRAIN_ENTRY
from cfe_hpc.config.load import Loaded
from cfe_hpc.config.run import Plan
from cfe_hpc.config.site import Hardware, Partition, expand_runs_root
from cfe_hpc.errors import Problem
from cfe_hpc.recovery.measured import Measured

if TYPE_CHECKING:
    from cfe_hpc.config.job import Job
    from cfe_hpc.config.site import Site
    from cfe_hpc.launch.planner.memory import MemoryEstimate

__all__ = ["Facts", "Look"]


class Facts:
    """A job, a site and the plan for them.

    Attributes:
        measured: what an earlier run of the job has measured in this partition.
        workdir: folder of submission; ranks start in it.
    """

    # No dataclass: making one costs a millisecond, of each `submit`.
    def __init__(self, *, loaded: Loaded, plan: Plan, measured: Measured | None, workdir: Path) -> None:
        self.loaded, self.plan, self.measured, self.workdir = loaded, plan, measured, workdir

    @property
    def job(self) -> Job:
        """The job as resolved."""
        return self.loaded.job

    @property
    def site(self) -> Site:
        """The site as resolved."""
        return self.loaded.site

    @property
    def partition(self) -> Partition:
        """The partition planned for."""
        return self.site.partitions[self.plan.partition]

    @property
    def hardware(self) -> Hardware:
        """Its nodes."""
        return self.site.hardware[self.partition.hardware]

    @property
    def on_slurm(self) -> bool:
        """Whether Slurm starts the ranks; on this machine the supervisor does."""
        return self.site.scheduler == "slurm"

    @cached_property
    def params(self) -> Any:
        """`cfe_hpc.train.config.Params` of a job that trains with what cfe_hpc ships; None for others."""
        if self.job.entry != TRAIN_ENTRY:
            return None
        # By dotted name: launch and train are neighbours that may not import one another.
        config = import_module("cfe_hpc.train.config")
        return config.read_params(self.job.params, file=self.loaded.job_file, origins=self.loaded.origins)

    @cached_property
    def memory(self) -> MemoryEstimate | None:
        """What the job takes of devices, nodes and disks; None when nothing tells how large its model is."""
        from cfe_hpc.launch.planner.memory import estimate

        return estimate(self.job, self.plan)

    @property
    def tasks(self) -> int:
        """Runs that are sent: the tasks of a sweep, of which the job is one, or 1."""
        return self.loaded.tasks

    @cached_property
    def runs_root(self) -> Path:
        """Where runs lie. Raises ConfigError when it names a variable that is not set."""
        return expand_runs_root(self.site, os.environ, file=self.file_of("site.storage.runs_root"))

    def file_of(self, key: str) -> str:
        """Where a value came from; the file in which to set it when it is a default.

        Args:
            key: beginning with `job.` or `site.`.
        """
        origin = self.loaded.origins.get(key, "default")
        if origin != "default":
            return origin
        return self.loaded.job_file if key.startswith("job.") else self.loaded.site_file

    def problem(self, key: str, what: str, remedy: str, value: Any = None) -> Problem:
        """What is wrong with the value at `key`, which begins with `job.` or `site.`."""
        return Problem(file=self.file_of(key), key=key.partition(".")[2], what=what, value=value, remedy=remedy)


Look = Callable[[Facts], Iterator[Problem]]
"""A check: yields what it finds. Starts no scheduler, writes nothing, and takes milliseconds."""
