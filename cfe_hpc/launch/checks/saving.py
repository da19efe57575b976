"""Checks of `[checkpoint]`: are there checkpoints to fall back on, and do its keys mean anything together?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec

from cfe_hpc.config.nearest import nearest
from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.units import format_duration, format_size

__all__ = [
    "best_unlogged",
    "kept_seldom",
    "local_tier",
    "no_checkpoints",
    "overlap_unused",
    "remote_package",
    "remote_tier",
    "saves_never",
    "staging_unused",
]

_LOGGED = ("val_loss", "loss", "grad_norm", "lr", "tokens")
"""What the training that cfe_hpc ships logs."""

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
"""What fsspec needs beside itself for an object store."""


def no_checkpoints(facts: Facts) -> Iterator[Problem]:
    checkpoint = facts.job.checkpoint
    if facts.job.entry is not None and checkpoint.every_steps is None and checkpoint.every is None:
        what = "a node that dies costs the whole run: nothing is saved until a stop is announced"
        yield facts.problem("job.checkpoint.every", what, 'set every_steps, or every = "15m"')


def kept_seldom(facts: Facts) -> Iterator[Problem]:
    keep, every = facts.job.checkpoint.keep_every_steps, facts.job.checkpoint.every_steps
    if keep is not None and every is not None and keep % every:
        what = f"checkpoints come every {every} steps, so that only every {math.lcm(keep, every)}th step is kept"
        yield facts.problem("job.checkpoint.keep_every_steps", what, f"use a multiple of {every}", keep)


def staging_unused(facts: Facts) -> Iterator[Problem]:
    checkpoint = facts.job.checkpoint
    if checkpoint.staging_memory is not None and not checkpoint.async_:
        what, value = "bounds what asynchronous checkpoints take, and these are not", checkpoint.staging_memory
        yield facts.problem("job.checkpoint.staging_memory", what, "set async = true", format_size(value))


def overlap_unused(facts: Facts) -> Iterator[Problem]:
    if facts.job.checkpoint.overlap and not facts.job.checkpoint.async_:
        what = "makes asynchronous checkpoints wait less, and these are not"
        yield facts.problem("job.checkpoint.overlap", what, "set async = true", True)


def local_tier(facts: Facts) -> Iterator[Problem]:
    if facts.job.checkpoint.local and facts.site.storage.node_local is None:
        what = "checkpoint.local writes to a folder of each node, and the site names none"
        remedy = "set it in the site profile, or take checkpoint.local out"
        yield facts.problem("site.storage.node_local", what, remedy)


def remote_tier(facts: Facts) -> Iterator[Problem]:
    url = facts.job.checkpoint.remote
    if url is not None and facts.site.environment.python is None and find_spec("fsspec") is None:
        what, remedy = "fsspec is not installed: no checkpoint would go there", "pip install cfe-hpc[remote]"
        yield facts.problem("job.checkpoint.remote", what, remedy, url)


def saves_never(facts: Facts) -> Iterator[Problem]:
    checkpoint, params, time_s = facts.job.checkpoint, facts.params, facts.plan.time_s
    every_s = checkpoint.every
    if checkpoint.every_steps is not None and params is not None and checkpoint.every_steps > params.steps:
        if every_s is None:
            what = f"the run has {params.steps} steps: none is saved before its end"
            yield facts.problem("job.checkpoint.every_steps", what, "lower it", checkpoint.every_steps)
    elif every_s is not None and checkpoint.every_steps is None and time_s is not None and every_s >= time_s:
        what = f"an attempt ends after {format_duration(time_s)}: until then nothing is saved"
        yield facts.problem("job.checkpoint.every", what, "lower it", format_duration(every_s))


def best_unlogged(facts: Facts) -> Iterator[Problem]:
    best = facts.job.checkpoint.keep_best
    if best is None or facts.params is None:
        return
    name = best.rpartition(":")[0]
    if name not in _LOGGED:
        near = nearest(name, _LOGGED)
        hint = f"did you mean {near}? " if near else ""
        what, remedy = "the training logs no such value: no checkpoint would be kept for it", hint
        yield facts.problem("job.checkpoint.keep_best", what, f"{remedy}it logs: {', '.join(_LOGGED)}", best)


def remote_package(facts: Facts) -> Iterator[Problem]:
    url = facts.job.checkpoint.remote
    package = _PACKAGES.get((url or "").partition("://")[0])
    known = facts.site.environment.python is None and find_spec("fsspec") is not None
    if package is not None and known and find_spec(package) is None:
        what = f"fsspec needs {package} for that, which is not installed: no checkpoint would go there"
        yield facts.problem("job.checkpoint.remote", what, f"pip install {package}", url)
