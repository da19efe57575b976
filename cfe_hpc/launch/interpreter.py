"""Which Python runs the ranks, and which one the batch script around them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cfe_hpc.config.node_environment import expand_path

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import RunSpec

__all__ = ["environment_folder", "interpreters", "resolved"]

_IN_CONTAINER = "python3"


def interpreters(loaded: Loaded) -> tuple[str, str | None]:
    """(the ranks' interpreter, the batch script's where that is another one).

    Raises:
        ConfigError: `[environment]` names a variable that is not set.
    """
    environment = loaded.job.environment
    folder = next((key for key in ("venv", "conda") if getattr(environment, key) is not None), None)
    if environment.python is not None:
        python = environment.python
    elif folder is not None:
        file = loaded.origins.get(f"job.environment.{folder}", loaded.job_file)
        python = f"{resolved(getattr(environment, folder), file=file, key=f'environment.{folder}')}/bin/python"
    else:
        python = sys.executable if environment.container.kind == "none" else _IN_CONTAINER
    # What is inside of a container cannot be run outside of it, where Slurm's commands are.
    return python, None if environment.container.kind == "none" else sys.executable


def environment_folder(spec: RunSpec) -> tuple[str, Path] | None:
    """("venv" or "conda", its folder) of a run; None when it has neither."""
    environment = spec.job.environment
    for key in ("venv", "conda"):
        text = getattr(environment, key)
        if text is not None:
            file = spec.origins.get(f"job.environment.{key}", spec.provenance.job_file)
            return key, Path(resolved(text, file=file, key=f"environment.{key}"))
    return None


def resolved(text: str, *, file: str, key: str) -> str:
    """A path of `[environment]` as every node will find it: expanded, and absolute.

    Raises:
        ConfigError: it names a variable that is not set.
    """
    return os.path.abspath(expand_path(text, os.environ, file=file, key=key))
