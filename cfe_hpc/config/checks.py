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
    "nodes": Row("error", "more nodes than one job may have in the partition", "ask for fewer"),
    "devices": Row("error", "more devices than a node has", "ask for fewer, on more nodes"),
    "cores": Row("error", "more cores than a node has", "ask for fewer cores for each device"),
    "memory": Row("error", "more memory than a node has", "ask for less"),
    "time": Row("error", "longer than the partition allows", "ask for less: the run goes on in further attempts"),
    "qos-time": Row("error", "longer than the quality of service allows", "ask for less, or choose another"),
    "signal-lead": Row("error", "the time limit is shorter than the signal's lead", "ask for more time"),
    "launcher": Row("error", "this version cannot start ranks that way", "choose another launcher", firm=True),
    # Looking at the plan.
    "data-missing": Row("error", "there is no token file at `params.data`", "build it with `cfe-hpc data build`"),
    "runs-root": Row(
        "error", "runs cannot be written where the site has them", "choose a folder that you may write to"
    ),
    "runs-root-private": Row(
        "warning", "runs lie where each node has files of its own", "choose a folder that every node sees"
    ),
    "program-missing": Row(
        "warning", "the entry's module or the command's program is not on this machine", "install it, or name its path"
    ),
    "no-checkpoints": Row(
        "warning", "nothing is saved until a stop is announced", "set `checkpoint.every_steps` or `checkpoint.every`"
    ),
    "kept-seldom": Row(
        "warning", "`keep_every_steps` is no multiple of `every_steps`", "make it one, or steps are kept more seldom"
    ),
    "staging-unused": Row("note", "`staging_memory` without asynchronous checkpoints", "set `async = true`"),
    "overlap-unused": Row("note", "`overlap` without asynchronous checkpoints", "set `async = true`"),
    "local-tier": Row(
        "error", "`checkpoint.local`, and the site names no folder on nodes", "set `storage.node_local` in the profile"
    ),
    "remote-tier": Row("error", "`checkpoint.remote`, and fsspec is not installed", "`pip install cfe-hpc[remote]`"),
    "short-grace": Row(
        "warning", "a step and a save take longer than preemption leaves", "save often, or choose another partition"
    ),
    "preemption-contract": Row(
        "note", "the profile does not say what Slurm does to a preempted job", "run `cfe-hpc sites check`"
    ),
    "no-requeue": Row("note", "the cluster requeues only jobs that ask for it", "nothing: all of cfe_hpc's do"),
    "elastic-batch": Row(
        "error", "global_batch does not divide among fewer nodes", "use a multiple of all, or raise `launch.nodes_min`"
    ),
    "signal-at-start": Row(
        "warning", "the signal before the time limit may come as soon as the attempt starts", "ask for more time"
    ),
    "no-time-limit": Row("note", "neither job nor site says a time limit", "set `resources.time`"),
    "preemption-cancels": Row(
        "note", "preempted jobs are cancelled: the run goes on as a new job", "nothing: the run id stays"
    ),
    "not-yet": Row("warning", "a key that this version does not heed", "use what the line names instead"),
    "git-dirty": Row("note", "tracked files have uncommitted changes", "commit them, so that the run can be repeated"),
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
