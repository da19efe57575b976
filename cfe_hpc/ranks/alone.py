"""A run folder for a script that was started by hand."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path

from cfe_hpc.config.job import Job
from cfe_hpc.config.run import Plan, Provenance, RunSpec
from cfe_hpc.config.site import Hardware, Partition, Preemption, Site
from cfe_hpc.errors import UsageError
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.runfolder import RunFolder, utc_now

__all__ = ["alone_folder", "next_attempt"]

_NODE_MEMORY_BYTES = 1 << 30


def alone_folder(facts: RankFacts) -> RunFolder:
    """A new run folder under `runs/` in the current folder, with the smallest run.toml that says what this is.

    Raises:
        UsageError: several ranks started by hand: they would each make a folder of their own.
    """
    if facts.world_size > 1:
        raise UsageError(
            f"join(): {facts.world_size} ranks were started without a run folder; "
            "start them with `cfe-hpc submit`, or set CFE_RUN_DIR to a run folder on every rank"
        )
    name = Path(sys.argv[0]).stem or "alone"
    folder = RunFolder.create(Path("runs"), name)
    spec = RunSpec(
        run_id=folder.run_id,
        job=Job(name=name, command=[sys.executable, *sys.argv]),
        site=Site(
            name="alone",
            scheduler="local",
            default_partition="here",
            partitions={"here": Partition(hardware="here")},
            hardware={
                "here": Hardware(
                    accelerator="cpu",
                    devices_per_node=1,
                    cores_per_node=os.cpu_count() or 1,
                    memory=_NODE_MEMORY_BYTES,
                )
            },
        ),
        plan=Plan(
            partition="here",
            queue="here",
            nodes=1,
            devices_per_node=1,
            world_size=1,
            cpus_per_device=os.cpu_count() or 1,
            accelerator="cpu",
            signal="USR2",
            signal_lead_s=0,
            preemption=Preemption(),
        ),
        provenance=Provenance(
            user=getpass.getuser(),
            host=socket.gethostname(),
            time=utc_now(),
            workdir=os.getcwd(),
            python=sys.executable,
            job_file="",
            site_file="",
        ),
    )
    spec.write(folder.run_toml)
    return folder


def next_attempt(folder: RunFolder) -> int:
    """The number of the attempt that begins now, where no scheduler counts them. Read it before ranks meet."""
    return 1 + max((int(event["attempt"]) for event in folder.events() if event["event"] == "started"), default=-1)
