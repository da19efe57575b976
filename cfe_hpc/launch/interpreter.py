"""Which Python runs the ranks, and which one the batch script around them."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from cfe_hpc.config.node_environment import expand_path

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import RunSpec

__all__ = ["editable", "environment_folder", "import_roots", "interpreters", "resolved"]

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


def import_roots(python: str, environ: Mapping[str, str]) -> list[str]:
    """Folders from which `python` imports what is being worked on: PYTHONPATH, and editable installations."""
    roots = [os.path.abspath(path) for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if python == sys.executable:
        folders = [Path(sysconfig.get_path("purelib"))]
    else:
        folders = list(Path(python).parent.parent.glob("lib/python3*/site-packages"))
    for project in (project for folder in folders for project in editable(folder)):
        roots += [str(project / "src")] if (project / "src").is_dir() else []
        roots.append(str(project))
    return roots


def editable(site_packages: Path, name: str = "*") -> Iterator[Path]:
    """The checkouts that editable installations there point to; of one package, as its record spells it, or of all."""
    for record in site_packages.glob(f"{name}-*.dist-info/direct_url.json"):
        origin = json.loads(record.read_text(encoding="utf-8"))
        if origin.get("dir_info", {}).get("editable"):
            yield Path(unquote(urlparse(origin["url"]).path)).resolve()
