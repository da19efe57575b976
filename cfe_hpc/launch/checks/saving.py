"""Checks of `[checkpoint]`: are there checkpoints to fall back on, and do its keys mean anything together?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.units import format_size

__all__ = ["kept_seldom", "local_tier", "no_checkpoints", "overlap_unused", "remote_tier", "staging_unused"]


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
