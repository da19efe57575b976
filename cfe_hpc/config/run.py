"""run.toml: a run as it was resolved and frozen at submission. Ranks read nothing else of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cfe_hpc.config.base import Strict
from cfe_hpc.config.job import Accelerator, Job
from cfe_hpc.config.site import Preemption, Site
from cfe_hpc.files import read_toml, write_atomic

__all__ = ["Plan", "Provenance", "RunSpec"]


class Plan(Strict):
    """What the run takes of the site. Pure arithmetic on job and site: the same inputs give the same plan."""

    partition: str = Field(description="the site profile's name of the partition")
    queue: str = Field(description="the scheduler's name of it; empty where jobs name none")
    nodes: int = Field(ge=1)
    devices_per_node: int = Field(ge=1)
    world_size: int = Field(ge=1, description="nodes times devices_per_node: one rank a device")
    cpus_per_device: int = Field(ge=1)
    accelerator: Accelerator
    memory_bytes: int | None = Field(None, description="memory asked for on each node; the site's default when None")
    time_s: float | None = Field(None, description="time limit of one attempt; none when None")
    gres: str | None = Field(None, description="the option's value, spelt out")
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal: str = Field(description="USR1 or USR2: sent before the time limit")
    signal_lead_s: int = Field(ge=0, description="seconds before the time limit at which it is sent")
    preemption: Preemption
    options: list[str] = Field(default_factory=list, description="further #SBATCH options")
    launcher: Literal["srun", "torchrun", "deepspeed"] = Field("srun", description="what starts the ranks of a node")
    nodes_min: int | None = Field(None, ge=1, description="fewest nodes an attempt may start on; `nodes` when None")
    restarts: int = Field(0, ge=0, description="times that the launcher may start the ranks again in one allocation")
    tasks_per_node: int | None = Field(None, ge=1, description="tasks of srun on a node; devices_per_node when None")


class Provenance(Strict):
    """Where the run came from."""

    user: str
    host: str
    time: str = Field(description="of submission: RFC 3339, UTC")
    workdir: str = Field(description="folder the job was submitted from; ranks start in it, or in its copy")
    python: str = Field(description="interpreter of the ranks; in a container, as it is named there")
    host_python: str | None = Field(
        None, description="interpreter of the batch script, outside of the ranks' container; `python` when None"
    )
    job_file: str
    site_file: str
    git_commit: str | None = Field(None, description="HEAD of the work tree in workdir")
    git_diff_sha256: str | None = Field(None, description="of `git diff HEAD`; None when clean or no work tree")
    work_tree: str | None = Field(None, description="top of the git work tree that workdir lies in, if it was copied")
    snapshot: str | None = Field(None, description="the copy of work_tree that ranks run; none when None")
    start_in: str | None = Field(None, description="what stands for workdir in the snapshot; workdir itself when None")
    versions: dict[str, str] = Field(default_factory=dict, description="of the packages that matter, as installed")

    @property
    def start_folder(self) -> str:
        """Where ranks start."""
        return self.start_in or self.workdir

    @property
    def batch_python(self) -> str:
        """The interpreter of what runs outside of the ranks' container: batch script, supervisor, export."""
        return self.host_python or self.python


def _plain(part: Any) -> Any:
    return part.model_dump(mode="python", by_alias=True, exclude_none=True) if isinstance(part, Strict) else part


class RunSpec(Strict):
    """The whole of run.toml."""

    run_id: str
    job: Job
    site: Site
    plan: Plan
    provenance: Provenance
    after: list[str] = Field(default_factory=list, description="folders of the runs that must have completed first")
    origins: dict[str, str] = Field(
        default_factory=dict, description='dotted key to where its value came from: "job.checkpoint.every_steps"'
    )

    def dump(self) -> str:
        """The text of run.toml. Values that are None are left out: TOML has no word for them."""
        import tomli_w

        parts = {"run_id": self.run_id, "job": self.job, "site": self.site, "plan": self.plan}
        parts |= {"after": self.after, "provenance": self.provenance, "origins": self.origins}
        # Part by part: whoever submits has the parts' serialisers, and need not build one of the whole.
        return tomli_w.dumps({name: _plain(part) for name, part in parts.items()})

    def write(self, path: Path) -> None:
        """Write run.toml, atomically."""
        write_atomic(path, self.dump())

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """Read a run.toml that `write` wrote.

        Raises:
            ConfigError: it is missing or not TOML.
            pydantic.ValidationError: it was edited into something else.
        """
        table: dict[str, Any] = read_toml(path)
        return cls.model_validate(table)
