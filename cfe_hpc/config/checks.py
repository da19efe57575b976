"""Every check by its id: what it looks for, how bad that is, what to do. Job files and `--ignore` name them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from cfe_hpc.config.nearest import nearest
from cfe_hpc.errors import Problem

__all__ = ["CHECKS", "Row", "Severity", "ignore_problems"]

Severity = Literal["error", "warning", "note"]


class Row(NamedTuple):
    """One check.

    Attributes:
        severity: "error": the run would fail, or never start; "warning": it may lose work or never get far; "note":
            worth knowing.
        finds: what it finds, as a sentence without its dot.
        fix: what to do.
        firm: it cannot be ignored, for nothing could be sent.
    """

    severity: Severity
    finds: str
    fix: str
    firm: bool = False


CHECKS: dict[str, Row] = {
    # Reading job and site.
    "schema": Row("error", "a file is no TOML, or a key or value is wrong", "correct what the line names", firm=True),
    "address": Row("error", "an address is no URL", "write for example http://host:9091", firm=True),
    "secret-in-address": Row(
        "error", "an address holds a user or a password", "give them as environment variables", firm=True
    ),
    "deepspeed-owned": Row(
        "error", "[engine.deepspeed] sets what other keys of the job decide", "set the key that is named", firm=True
    ),
    "command-parameter": Row(
        "error", "the command asks for a parameter that is not in [params]", "add it, or correct its name", firm=True
    ),
    "head-dimensions": Row(
        "error", "d_model does not divide by heads, or gives heads of odd width", "change one of them", firm=True
    ),
    "batch": Row(
        "error",
        "global_batch is no multiple of micro_batch times the number of ranks",
        "change one of the three",
        firm=True,
    ),
    "partition": Row("error", "the site has no such partition", "choose one that it has", firm=True),
    # Planning: what the profile says of the site.
    "accelerator": Row("error", "the partition has other devices", "choose another partition or site"),
    "nodes": Row("error", "more or fewer nodes than the partition or the QOS gives one job", "ask for what it gives"),
    "devices": Row(
        "error", "more devices than a node has, or than the QOS gives one job", "ask for fewer, on more nodes"
    ),
    "cores": Row("error", "more cores than a node has", "ask for fewer cores for each device"),
    "memory": Row("error", "more memory than a node has, or than the partition gives of it", "ask for less"),
    "time": Row("error", "longer than the partition allows", "ask for less: the run goes on in further attempts"),
    "qos-time": Row("error", "longer than the quality of service allows", "ask for less, or choose another"),
    "signal-lead": Row("error", "the time limit is shorter than the signal's lead", "ask for more time"),
    "launcher": Row("error", "this version cannot start ranks that way", "choose another launcher", firm=True),
    "impossible": Row(
        "error",
        'with `partition = "auto"`: the job could start nowhere',
        "change what the line of a partition names",
        firm=True,
    ),
    # Looking at the plan. Access and cost.
    "account-missing": Row(
        "error", "the site wants an account of every job, and this one names none", "set `resources.account`"
    ),
    "account": Row("error", "the partition does not take jobs of the account", "choose one that it takes"),
    "qos": Row("error", "the partition does not take jobs of the quality of service", "choose one that it takes"),
    "constraint": Row(
        "warning", "no node of the partition has a feature that is asked for", "choose one that the profile knows"
    ),
    "array-size": Row("note", "more tasks than one array may have", "nothing: they go out as several arrays"),
    "submit-max": Row("warning", "more tasks than the quality of service takes jobs of one user", "take fewer values"),
    "cost": Row("error", "a full attempt costs more than `resources.cost_max`", "ask for less, or raise it"),
    "cost-unknown": Row(
        "warning",
        "`resources.cost_max` is set, and price or time limit are not known",
        "set `cost_per_node_hour` in the profile",
    ),
    "site-unverified": Row(
        "note",
        "the profile was taken from documentation, and nobody compared it with the cluster",
        "run `cfe-hpc sites check` there",
    ),
    # Devices and cores.
    "gres-missing": Row("warning", "devices are never asked for", "set `gres` of the hardware"),
    "gres-fixed": Row(
        "warning", "the GRES asks for another number of devices than there are ranks", "write {devices} in it"
    ),
    "whole-nodes": Row(
        "note", "a job gets and pays for whole nodes, and uses some of their devices", "ask for all of them"
    ),
    "cores-share": Row(
        "note", "more cores than a device's share, so that other devices stay idle", "ask for the share"
    ),
    "threads": Row("warning", "more OpenMP threads than a rank has cores", "lower OMP_NUM_THREADS"),
    # Memory.
    "model-memory": Row(
        "error",
        "model and optimizer alone are larger than a device's memory",
        "use a higher ZeRO stage, or more devices",
    ),
    "device-memory": Row("warning", "with activations it is more than a device's memory", "lower `params.micro_batch`"),
    "node-memory": Row(
        "warning", "ranks take more memory than the job gets of a node", "ask for more, or for fewer ranks on a node"
    ),
    # The engine.
    "deepspeed-trainer": Row(
        "error", "[engine.deepspeed] sets what the [params] of the shipped training decide", "set it in [params]"
    ),
    "offload-stage": Row("warning", "offloading that the ZeRO stage does not allow", "raise `engine.zero_stage`"),
    "offload-path": Row("error", "offloading to NVMe names no folder", "set `nvme_path`"),
    "optimizer": Row(
        "error", "an optimizer that DeepSpeed cannot use that way", "choose another, or do not offload it"
    ),
    "offload-cpu": Row("warning", "ranks train on CPUs: offloading moves nothing", "take it out"),
    "unsaved-state": Row("error", "DeepSpeed is to keep state that cfe_hpc cannot save", "take it out"),
    "grad-accum": Row(
        "error",
        "gradients are to be accumulated in a type that DeepSpeed knows from ZeRO 1 on",
        "raise `engine.zero_stage`",
    ),
    "bf16-hardware": Row(
        "warning", "bf16 on devices that do not compute in it", 'set `precision = "fp32"`, or choose newer devices'
    ),
    "engine-unused": Row(
        "warning", "DeepSpeed's keys with another engine", 'set `kind = "deepspeed"`, or take them out'
    ),
    "zero-alone": Row("note", "a ZeRO stage for one rank alone", "ask for more devices"),
    # Files.
    "data-missing": Row("error", "there is no token file at `params.data`", "build it with `cfe-hpc data build`"),
    "data-damaged": Row("error", "the token file is cut off, or no HDF5 file", "build it again"),
    "data-private": Row("warning", "the token file lies where nodes do not see it", "copy it to a shared folder"),
    "workdir-private": Row(
        "warning",
        "the folder of submission lies where nodes do not see it",
        "submit from a shared folder",
    ),
    "runs-root": Row(
        "error", "runs cannot be written where the site has them", "choose a folder that you may write to"
    ),
    "runs-root-private": Row("warning", "runs lie where nodes do not see them", "choose a shared folder"),
    "program-missing": Row(
        "warning", "the entry's module or the command's program is not on this machine", "install it, or name its path"
    ),
    "python-missing": Row(
        "warning", "the interpreter that the site names is not on this machine", "correct `environment.python`"
    ),
    "secret-in-job": Row("warning", "a value looks like a password or a key", "let the program read it from a file"),
    "git-dirty": Row("note", "tracked files have uncommitted changes", "commit them, so that the run can be repeated"),
    # Room.
    "disk-full": Row("error", "the disk that runs go to is full", "make room, or choose another folder"),
    "checkpoint-space": Row(
        "warning",
        "less is free than `keep_last` checkpoints and the next one take",
        "lower `checkpoint.keep_last`, or make room",
    ),
    "quota": Row(
        "warning",
        "`keep_last` checkpoints and the next one are more than the site's quota",
        "lower `checkpoint.keep_last`",
    ),
    "inodes": Row("warning", "logs and checkpoints are more files than can be made", "lower `checkpoint.keep_last`"),
    "quota-files": Row(
        "warning", "logs and checkpoints are more files than the site's quota", "lower `checkpoint.keep_last`"
    ),
    "quota-left": Row(
        "warning",
        "checkpoints and logs are more than is left of a quota on Lustre",
        "lower `checkpoint.keep_last`, or make room",
    ),
    "purged": Row("note", "checkpoints kept for good lie where the site deletes old files", "copy them away in time"),
    # Checkpoints.
    "no-checkpoints": Row(
        "warning", "nothing is saved until a stop is announced", "set `checkpoint.every_steps` or `checkpoint.every`"
    ),
    "saves-never": Row("warning", "the first save would come after the end", "save more often"),
    "kept-seldom": Row(
        "warning", "`keep_every_steps` is no multiple of `every_steps`", "make it one, or steps are kept more seldom"
    ),
    "resume-missing": Row(
        "error", "`checkpoint.resume_from` names no run that has saved", "name one that has, or take it out"
    ),
    "resume-shapes": Row(
        "error",
        "the checkpoint to begin with is of another model, batch or seed",
        "set what the line says",
    ),
    "best-unlogged": Row(
        "warning", "`keep_best` names a value that the shipped training does not log", "choose one that it logs"
    ),
    "staging-unused": Row("note", "`staging_memory` without asynchronous checkpoints", "set `async = true`"),
    "overlap-unused": Row("note", "`overlap` without asynchronous checkpoints", "set `async = true`"),
    "local-tier": Row(
        "error", "`checkpoint.local`, and the site names no folder on nodes", "set `storage.node_local` in the profile"
    ),
    "node-local-shared": Row(
        "warning", "the folder on nodes lies on a filesystem that all share", "name a disk of each node"
    ),
    "node-local-space": Row(
        "warning", "a node's part of a checkpoint is larger than `checkpoint.local_size`", "raise it"
    ),
    "remote-tier": Row("error", "`checkpoint.remote`, and fsspec is not installed", "`pip install cfe-hpc[remote]`"),
    "remote-package": Row("error", "fsspec lacks the package for that kind of store", "install the one that is named"),
    # Stops.
    "lead-short": Row(
        "warning", "a step and a save, as measured, need the signal sooner than it can be sent", "ask for more time"
    ),
    "signal-at-start": Row(
        "warning", "the signal before the time limit may come as soon as the attempt starts", "ask for more time"
    ),
    "no-time-limit": Row("note", "neither job nor site says a time limit", "set `resources.time`"),
    "short-grace": Row(
        "warning", "a step and a save take longer than preemption leaves", "save often, or choose another partition"
    ),
    "preemption-contract": Row(
        "note", "the profile does not say what Slurm does to a preempted job", "run `cfe-hpc sites check`"
    ),
    "preemption-cancels": Row(
        "note", "preempted jobs are cancelled: the run goes on as a new job", "nothing: the run id stays"
    ),
    "no-requeue": Row("note", "the cluster requeues only jobs that ask for it", "nothing: all of cfe_hpc's do"),
    "nccl-signal": Row(
        "warning", "the signal before the time limit is one that NCCL uses", 'set `slurm.signal = "USR2"`'
    ),
    "elastic-batch": Row(
        "error",
        "`global_batch` does not divide among fewer nodes",
        "use a multiple of all, or raise `launch.nodes_min`",
    ),
    "elastic-local": Row("note", "`launch.nodes_min` on this machine", "nothing: it counts on Slurm"),
    # Ports and addresses.
    "port-privileged": Row("warning", "a port that only root may open", "choose one from 1024 on"),
    "port-taken": Row("warning", "a port that another process of this machine has", "choose another"),
    "port-ephemeral": Row("note", "a port that a connection going out may have first", "choose one below the range"),
    "metrics-package": Row(
        "warning", "metrics are asked for, and prometheus_client is not installed", "`pip install cfe-hpc[train]`"
    ),
    "gateway-loopback": Row(
        "warning", "nodes would look for the gateway on themselves", "name its host as nodes see it"
    ),
    "gateway-password": Row("warning", "the gateway's password would cross the network in clear", "use https"),
    "not-yet": Row("warning", "a key that this version does not heed", "use what the line names instead"),
}
"""In the order of docs/checks.md. A check is added by a row here and a function in launch.checks."""


def ignore_problems(ids: Iterable[str], *, file: str, key: str) -> Iterator[Problem]:
    """What is wrong with a list of checks to ignore.

    Args:
        file: where the list stands, as messages name it.
        key: of the list; "" on the command line.
    """
    for name in ids:
        row = CHECKS.get(name)
        if row is None:
            near = nearest(name, CHECKS)
            remedy = f"did you mean {near}?" if near else "docs/checks.md lists them all"
            yield Problem(file=file, key=key, what="no such check", value=name, remedy=remedy)
        elif row.firm:
            what, remedy = "cannot be ignored: nothing could be sent", "correct what it finds"
            yield Problem(file=file, key=key, what=what, value=name, remedy=remedy)
