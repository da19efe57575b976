"""`[environment]`: what a node needs before Python starts. A site states it, a job may state otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cfe_hpc.config.base import Strict
from cfe_hpc.errors import ConfigError, Problem

__all__ = ["Container", "Environment", "environment_problems", "expand_path", "mount_parts"]

Report = Callable[..., Problem]
Key = tuple[str | int, ...]

_MOUNT = re.compile(r"(?P<source>[^:,]+)(?::(?P<target>/[^:,]*)(?::(?P<options>[a-z]+(?:\+[a-z]+)*))?)?")
_OPTION = re.compile(r"--?[A-Za-z][A-Za-z0-9-]*(=.*)?", re.DOTALL)


class Container(Strict):
    """`[environment.container]`: what the ranks run in; the batch script stays outside."""

    kind: Literal["none", "apptainer", "pyxis", "enroot"] = Field(
        "none",
        description='what runs the image; "none" takes the site\'s container away from a job',
        examples=['"apptainer"'],
    )
    image: str | None = Field(
        None,
        description="the image as that program names it: a file, or what a registry is asked for; ~ and $VARIABLES are "
        "expanded",
        examples=['"/shared/images/torch.sif"'],
    )
    mounts: list[str] = Field(
        default_factory=list,
        description='folders that ranks see, "SOURCE", "SOURCE:TARGET" or "SOURCE:TARGET:ro"; those of the run, of the '
        "code and of cfe_hpc are seen anyway",
        examples=['["/scratch", "/data/tokens:/data:ro"]'],
    )
    options: list[str] = Field(
        default_factory=list,
        description="further options of srun (pyxis), `apptainer exec` or `enroot start`",
        examples=['["--nv"]'],
    )


class Environment(Strict):
    """`[environment]`: what a node needs before Python starts."""

    modules: list[str] = Field(
        default_factory=list, description="environment modules to load", examples=['["cuda/12.4"]']
    )
    venv: str | None = Field(
        None,
        description="folder of a virtual environment that every node sees; ~ and $VARIABLES are expanded",
        examples=['"$HOME/venvs/train"'],
    )
    conda: str | None = Field(
        None,
        description="folder of a conda environment (`conda env list` shows it); ~ and $VARIABLES are expanded",
        examples=['"$HOME/miniforge3/envs/train"'],
    )
    setup: list[str] = Field(
        default_factory=list, description="shell lines run before srun, as they stand", examples=['["ulimit -c 0"]']
    )
    variables: dict[str, str] = Field(
        default_factory=dict, description="variables set for every rank", examples=['{ PT_HPU_LAZY_MODE = "0" }']
    )
    python: str | None = Field(
        None,
        description="interpreter on the nodes, or in the container; when left out that of venv or conda, else the "
        "submitting one, else the container's python3",
        examples=['"/opt/venv/bin/python"'],
    )
    container: Container = Field({}, validate_default=True)

    @property
    def is_ours(self) -> bool:
        """Whether ranks run the interpreter that submits, with the packages that it has."""
        return self.python is None and self.venv is None and self.conda is None and self.container.kind == "none"


def environment_problems(environment: Environment, path: Key, report: Report) -> Iterator[Problem]:
    """Rules between the values of an `[environment]`, beyond its variables."""
    if environment.venv is not None and environment.conda is not None:
        yield report((*path, "conda"), "given together with venv", "keep one of the two", environment.conda)
    for key in ("venv", "conda", "python"):
        value = getattr(environment, key)
        if value is not None and not value.strip():
            yield report((*path, key), "is empty", "name it, or take it out")
    for index, module in enumerate(environment.modules):
        if not module.strip() or module.startswith("-"):
            yield report((*path, "modules", index), "is no module's name", "`module avail` lists them", module)
    yield from _container_problems(environment.container, (*path, "container"), report)


def _container_problems(container: Container, path: Key, report: Report) -> Iterator[Problem]:
    if container.kind != "none" and not container.image:
        yield report((*path, "image"), f"missing, and {container.kind} needs one", "name the image", container.image)
    for index, mount in enumerate(container.mounts):
        if not _MOUNT.fullmatch(mount):
            remedy = 'write "SOURCE", "SOURCE:TARGET" or "SOURCE:TARGET:ro"'
            yield report((*path, "mounts", index), "is no mount", remedy, mount)
    for index, option in enumerate(container.options):
        if not _OPTION.fullmatch(option):
            remedy = 'write "--name" or "--name=value", one option an entry'
            yield report((*path, "options", index), "is no single option", remedy, option)


def expand_path(text: str, environ: Mapping[str, str], *, file: str, key: str) -> str:
    """`text` with ~ and $VARIABLES expanded, as `environ` has them.

    Args:
        file: where the text stands, as messages name it.
        key: its key there.

    Raises:
        ConfigError: it names a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environ:
            what, remedy = f"variable {name} is not set", "set it, or write the path outright"
            raise ConfigError([Problem(file=file, key=key, what=what, value=text, remedy=remedy)])
        return environ[name]

    expanded = re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, text)
    return str(Path(expanded).expanduser()) if expanded.startswith("~") else expanded


def mount_parts(mount: str) -> tuple[str, str, str]:
    """(source, target, options) of a mount as `environment_problems` lets it through; options may be empty."""
    match = _MOUNT.fullmatch(mount)
    parts: dict[str, Any] = {} if match is None else match.groupdict()
    source = str(parts.get("source") or mount)
    return source, str(parts.get("target") or source), str(parts.get("options") or "")
