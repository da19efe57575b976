"""A small run.toml for tests."""

from __future__ import annotations

from typing import Any

from cfe_hpc.config.job import Job
from cfe_hpc.config.run import Plan, Provenance, RunSpec
from cfe_hpc.config.site import Hardware, Partition, Preemption, Site

RUN_ID = "toy-20260131-235959-abcd"


def run_spec(*, run_id: str = RUN_ID, scheduler: str = "local", **job: Any) -> RunSpec:
    """A run of one rank on this machine; `job` holds tables of the job file, e.g. metrics={...}."""
    hardware = Hardware(accelerator="cpu", devices_per_node=1, cores_per_node=1, memory=1 << 30)
    partitions = {"here": Partition(hardware="here")}
    site = Site.model_validate(
        {
            "name": "tests",
            "scheduler": scheduler,
            "default_partition": "here",
            "partitions": partitions,
            "hardware": {"here": hardware},
        }
    )
    return RunSpec(
        run_id=run_id,
        job=Job.model_validate({"name": "toy", "entry": "toy:run", **job}),
        site=site,
        plan=Plan(
            partition="here",
            queue="here",
            nodes=1,
            devices_per_node=1,
            world_size=1,
            cpus_per_device=1,
            accelerator="cpu",
            signal="USR2",
            signal_lead_s=0,
            preemption=Preemption(),
        ),
        provenance=Provenance(
            user="me",
            host="here",
            time="2026-01-31T23:59:59.000Z",
            workdir="/",
            python="python",
            job_file="toy.toml",
            site_file="tests.toml",
        ),
    )
