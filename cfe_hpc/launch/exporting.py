"""The weights of epochs' ends as files, when the run has completed: a small job beside it, or a last act here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.site import Partition
from cfe_hpc.launch.script import prologue
from cfe_hpc.runfolder import RunFolder, safe_name
from cfe_hpc.units import slurm_time

__all__ = ["export_command", "export_script"]

_CPUS = 2  # one that reads and writes, one that rounds


def export_command(spec: RunSpec, folder: RunFolder) -> list[str] | None:
    """What makes the files of a run that has completed; None when the job asks for none."""
    dtype = spec.job.checkpoint.export_epochs
    if dtype is None:
        return None
    words = ["checkpoints", "export", str(folder.path), "--epochs", "--dtype", dtype, "--json"]
    return [spec.provenance.batch_python, "-m", "cfe_hpc", *words]


def export_script(spec: RunSpec, folder: RunFolder, *, log: Sequence[str]) -> str:
    """The sbatch script of that job: one task, no devices.

    Args:
        log: names of the files for standard output and error, as Slurm spells them.
    """
    command = export_command(spec, folder)
    assert command is not None
    name, partition = _cpu_partition(spec)
    own = name == spec.plan.partition
    options = {
        "job-name": f"{safe_name(spec.job.name)}-export",
        "partition": partition.queue_of(name),
        "account": spec.plan.account if own else spec.job.resources.account or partition.account,
        "qos": spec.plan.qos if own else partition.qos,
        "time": None if partition.default_time is None else slurm_time(partition.default_time),
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": str(_CPUS),
        "output": log[0],
        "error": log[1],
    }
    directives = [f"#SBATCH --{key}={shlex.quote(_escaped(value))}" for key, value in options.items() if value]
    lines = ["#!/bin/bash", *directives, "#SBATCH --requeue", "#SBATCH --open-mode=append", *prologue(spec, folder)]
    return "\n".join([*lines, 'cd -- "$CFE_RUN_DIR" || exit 1', f"exec {_in_container(spec, folder, command)}", ""])


def _in_container(spec: RunSpec, folder: RunFolder, command: Sequence[str]) -> str:
    """Shell words that run the command where the ranks' packages are."""
    if spec.job.environment.container.kind == "none":
        return shlex.join(command)
    from cfe_hpc.launch.container import contained, srun_options  # late: few jobs have one

    words = shlex.join([spec.provenance.python, *command[1:]])
    asked = srun_options(spec, folder)
    return f"srun{asked} {words}" if asked else contained(spec, folder, words)


def _escaped(value: str) -> str:
    # sbatch reads a backslash as an escape even between single quotes.
    return value.replace("\\", "\\\\")


def _cpu_partition(spec: RunSpec) -> tuple[str, Partition]:
    """The first partition whose nodes have no devices to ask for, else the run's own."""
    for name, partition in spec.site.partitions.items():
        hardware = spec.site.hardware[partition.hardware]
        if hardware.accelerator == "cpu" and hardware.gres is None:
            return name, partition
    return spec.plan.partition, spec.site.partitions[spec.plan.partition]
