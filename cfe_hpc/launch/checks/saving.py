"""Checks of `[checkpoint]`: are there checkpoints to fall back on, and do its keys mean anything together?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cfe_hpc.config.nearest import nearest
from cfe_hpc.errors import CheckpointError, CorruptCheckpoint, Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.units import format_duration, format_size

if TYPE_CHECKING:
    from cfe_hpc.checkpoints.manifest import Manifest

__all__ = [
    "best_unlogged",
    "kept_seldom",
    "local_tier",
    "no_checkpoints",
    "overlap_unused",
    "remote_package",
    "remote_tier",
    "resume_missing",
    "resume_shapes",
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
    if url is not None and facts.job.environment.is_ours and find_spec("fsspec") is None:
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
        what = "the training logs no such value: no checkpoint would be kept for it"
        yield facts.problem("job.checkpoint.keep_best", what, f"{hint}it logs: {', '.join(_LOGGED)}", best)


def remote_package(facts: Facts) -> Iterator[Problem]:
    url = facts.job.checkpoint.remote
    package = _PACKAGES.get((url or "").partition("://")[0])
    known = facts.job.environment.is_ours and find_spec("fsspec") is not None
    if package is not None and known and find_spec(package) is None:
        what = f"fsspec needs {package} for that, which is not installed: no checkpoint would go there"
        yield facts.problem("job.checkpoint.remote", what, f"pip install {package}", url)


def resume_missing(facts: Facts) -> Iterator[Problem]:
    found = _resumed(facts)
    if isinstance(found, str):
        remedy = "name the folder or the id of a run that has saved, or take it out"
        yield facts.problem("job.checkpoint.resume_from", found, remedy, facts.job.checkpoint.resume_from)


def resume_shapes(facts: Facts) -> Iterator[Problem]:
    found = _resumed(facts)
    if found is None or isinstance(found, str) or facts.params is None:
        return
    saved: dict[str, Any] = found.layout.get("facts", {})
    for name, value in facts.params.facts().items():
        if name in saved and saved[name] != value:
            key = "d_ff" if name == "ff_dim" else name
            what = f"step {found.identity.step} of {found.identity.run_id} was saved with {saved[name]}"
            remedy = "set it to that, or take checkpoint.resume_from out"
            yield facts.problem(f"job.params.{key}", what, remedy, value)


def _resumed(facts: Facts) -> Manifest | str | None:
    """The manifest of the checkpoint that the run begins with, or why there is none; None where it begins at step 0."""
    stated = facts.job.checkpoint.resume_from
    if stated is None or "{stage." in stated:  # an earlier stage's run, which is not there yet
        return None
    from cfe_hpc.checkpoints import folders
    from cfe_hpc.checkpoints.keeping.rotation import glance
    from cfe_hpc.recovery.origin import origin_at

    run = origin_at(stated, workdir=facts.workdir, runs_root=facts.runs_root)
    if not run.run_toml.is_file():
        return f"there is no run in {run.path}"
    why = ""
    for _, folder in folders.committed(run.checkpoints):
        try:
            return glance(folder, run.run_id)
        except CorruptCheckpoint as error:
            why = why or f"none of its checkpoints can be used; the newest, {folder.name}: {error}"
        except CheckpointError:  # crc32c is not installed: ranks have it
            return None
    return why or "nothing is saved there yet"
