"""Checks of room: memory of devices and nodes, space, quota and files where runs lie."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.launch.checks.files import standing
from cfe_hpc.units import format_duration, format_size

__all__ = [
    "checkpoint_space",
    "device_memory",
    "disk_full",
    "inodes",
    "kept_bytes",
    "kept_files",
    "model_memory",
    "node_local_space",
    "node_memory",
    "purged",
    "quota",
    "quota_files",
]

_LEAST_BYTES, _LEAST_FILES = 1 << 20, 64
"""Below this not even a run folder can be written."""

_STATES = ("weights", "gradients", "optimizer")
"""What is there in every step for sure; the rest of an estimate is reckoned more freely."""

_FILES_OF_A_RUN = 40
"""Without logs and checkpoints: what `submit` writes, and promises between processes."""


def model_memory(facts: Facts) -> Iterator[Problem]:
    found = _device(facts)
    if found is None:
        return
    _, states, there = found
    if states > there:
        what = f"less than the {format_size(states)} that model and optimizer take of each device"
        remedy = "use a higher ZeRO stage, more devices, or offload"
        yield _of_hardware(facts, "device_memory", what, remedy, there)


def device_memory(facts: Facts) -> Iterator[Problem]:
    found = _device(facts)
    if found is None:
        return
    taken, states, there = found
    if taken > there >= states:
        known = facts.params is not None
        counted = "activations included" if known else "buffers included, activations aside"
        what = f"less than the {format_size(taken)} or so that each device needs, {counted}"
        remedy = "use a higher ZeRO stage, or more devices"
        if known:
            remedy = "lower params.micro_batch; at run time it is halved by itself"
        yield _of_hardware(facts, "device_memory", what, remedy, there)


def _device(facts: Facts) -> tuple[int, int, int] | None:
    """Bytes of a device that are taken, those of the model's states among them, and those there are."""
    memory, there = facts.memory, facts.hardware.device_memory
    if memory is None or there is None or facts.plan.accelerator == "cpu":
        return None
    states = sum(part.size_bytes for part in memory.parts if part.where == "device" and part.name in _STATES)
    return memory.device_bytes, states, there


def _of_hardware(facts: Facts, key: str, what: str, remedy: str, size_bytes: int) -> Problem:
    return facts.problem(f"site.hardware.{facts.partition.hardware}.{key}", what, remedy, format_size(size_bytes))


def node_memory(facts: Facts) -> Iterator[Problem]:
    memory, plan, partition = facts.memory, facts.plan, facts.partition
    if memory is None or not facts.on_slurm:
        return
    share = partition.memory_per_core_default
    by_cores = None if share is None else share * plan.cpus_per_device * plan.devices_per_node
    there = plan.memory_bytes or partition.memory_default or by_cores or facts.hardware.memory
    if memory.node_bytes > there:
        what = f"less than the {format_size(memory.node_bytes)} or so that ranks take of each node"
        remedy = "ask for more, for fewer ranks on a node, or set checkpoint.staging_memory"
        yield facts.problem("job.resources.memory", what, remedy, format_size(there))


def kept_bytes(facts: Facts) -> int | None:
    """Of the checkpoints that lie there at a time, the one being written included; of all tasks of a sweep."""
    memory = facts.memory
    if memory is None:
        return None
    return memory.checkpoint_bytes * (facts.job.checkpoint.keep_last + 1) * facts.tasks


def kept_files(facts: Facts) -> int:
    """Of all tasks: logs of one attempt, checkpoints of each rank a data file and an index."""
    ranks, checkpoints = facts.plan.world_size, facts.job.checkpoint.keep_last + 1
    return facts.tasks * (_FILES_OF_A_RUN + 2 * ranks + checkpoints * (2 * ranks + 2))


def _what_is_kept(facts: Facts, needed_bytes: int) -> str:
    tasks = "" if facts.tasks == 1 else f", for each of {facts.tasks} tasks,"
    return f"{facts.job.checkpoint.keep_last} checkpoints and the next one{tasks} take {format_size(needed_bytes)}"


_LESS = "lower checkpoint.keep_last, or choose another storage.runs_root"


def checkpoint_space(facts: Facts) -> Iterator[Problem]:
    needed_bytes = kept_bytes(facts)
    if needed_bytes is None:
        return
    there = _statvfs(facts)
    free_bytes = there.f_bavail * there.f_frsize
    if free_bytes < needed_bytes and there.f_blocks:
        what = f"{_what_is_kept(facts, needed_bytes)}, and {format_size(free_bytes)} are free under {facts.runs_root}"
        yield facts.problem("job.checkpoint.keep_last", what, _LESS, facts.job.checkpoint.keep_last)


def quota(facts: Facts) -> Iterator[Problem]:
    needed_bytes, allowed = kept_bytes(facts), facts.site.storage.quota
    if needed_bytes is not None and allowed is not None and allowed < needed_bytes:
        what = f"{_what_is_kept(facts, needed_bytes)}, more than one may have there"
        yield facts.problem("site.storage.quota", what, _LESS, format_size(allowed))


def quota_files(facts: Facts) -> Iterator[Problem]:
    needed, allowed = kept_files(facts), facts.site.storage.quota_files
    if allowed is not None and allowed < needed:
        what = f"logs and checkpoints are up to {needed} files, more than one may have there"
        yield facts.problem("site.storage.quota_files", what, _LESS, allowed)


def inodes(facts: Facts) -> Iterator[Problem]:
    there, needed = _statvfs(facts), kept_files(facts)
    # Filesystems that count no files say 0 of 0.
    if there.f_files and there.f_favail < needed:
        what = f"logs and checkpoints are up to {needed} files, and {there.f_favail} more can be made there"
        yield facts.problem("site.storage.runs_root", what, _LESS, str(facts.runs_root))


def disk_full(facts: Facts) -> Iterator[Problem]:
    there = _statvfs(facts)
    free_bytes = there.f_bavail * there.f_frsize
    if (there.f_blocks and free_bytes < _LEAST_BYTES) or (there.f_files and there.f_favail < _LEAST_FILES):
        what = f"the disk is full: {format_size(free_bytes)} and {there.f_favail} files are left there"
        remedy = "make room, or choose another folder"
        yield facts.problem("site.storage.runs_root", what, remedy, str(facts.runs_root))


def _statvfs(facts: Facts) -> os.statvfs_result:
    return os.statvfs(standing(facts.runs_root))


def node_local_space(facts: Facts) -> Iterator[Problem]:
    memory, bound = facts.memory, facts.job.checkpoint.local_size
    if memory is None or bound is None or not facts.job.checkpoint.local:
        return
    copies = 2 if facts.job.checkpoint.partner else 1
    share_bytes = copies * memory.checkpoint_bytes // facts.plan.nodes
    if share_bytes > bound:
        what = f"a node's part of a checkpoint takes {format_size(share_bytes)}: none would go there"
        yield facts.problem(
            "job.checkpoint.local_size", what, "raise it, or take checkpoint.local out", format_size(bound)
        )


def purged(facts: Facts) -> Iterator[Problem]:
    checkpoint, after_s = facts.job.checkpoint, facts.site.storage.purge_after
    for_good = checkpoint.keep_every_steps or checkpoint.keep_best or checkpoint.keep_epochs or checkpoint.export_epochs
    if after_s is not None and for_good:
        what = "checkpoints that are kept for good lie where the site deletes what nobody touches"
        yield facts.problem("site.storage.purge_after", what, "copy them away in time", format_duration(after_s))
