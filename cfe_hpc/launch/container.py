"""The ranks' container: what is looked for on the node, options of srun, and words before those of a task."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import cfe_hpc
from cfe_hpc.config.node_environment import expand_path, mount_parts
from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import ConfigError, Problem
from cfe_hpc.launch.interpreter import environment_folder
from cfe_hpc.launch.refusing import stated_in, unless
from cfe_hpc.runfolder import RunFolder

__all__ = ["contained", "container_checks", "srun_options"]

# Enroot hands on no variable of the host's that it is not told of; these are the image's own.
_ENROOT = (
    'args=(); for name in $(compgen -e); do case "$name" in PATH|LD_LIBRARY_PATH|HOME|SHELL|PWD|OLDPWD|SHLVL|_) ;; '
    '*) args+=(--env "$name") ;; esac; done; exec enroot start "${args[@]}" "$@"'
)

# srun starts tasks in the run folder; Enroot starts a command where the image says.
_THERE = 'cd -- "$CFE_RUN_DIR" && exec "$@"'


def container_checks(spec: RunSpec) -> list[str]:
    """Lines that end the run unless the node has the container's program, and its image where that is a file;
    `cfe_refuse` is defined by then.

    Raises:
        ConfigError: the image names a variable that is not set; pyxis where there is no srun.
    """
    kind = spec.job.environment.container.kind
    if kind == "none":
        return []
    file = stated_in(spec, "container.kind")
    if kind == "pyxis" and spec.site.scheduler != "slurm":
        remedy = 'use "enroot" or "apptainer" there'
        what = "is a plugin of Slurm's, and this site has none"
        raise ConfigError([Problem(file=file, key="environment.container.kind", what=what, value=kind, remedy=remedy)])
    there = {
        "apptainer": 'cfe_container="$(command -v apptainer || command -v singularity)"',
        "pyxis": "srun --help 2>&1 | grep -q -e --container-image",
        "enroot": "command -v enroot >/dev/null",
    }[kind]
    lines = [unless(there, f"{file}: environment.container.kind: there is no {kind} on", f"ask your site for {kind}")]
    image = _image(spec)
    if image.startswith(("/", ".")):
        what = f"{stated_in(spec, 'container.image')}: environment.container.image: {image} is not there on"
        lines.append(unless(f"[ -e {shlex.quote(image)} ]", what, "name one that every node sees"))
    return lines


def srun_options(spec: RunSpec, folder: RunFolder) -> str:
    """What srun itself is told of the container, beginning with a space; nothing unless it is pyxis's."""
    container = spec.job.environment.container
    if container.kind != "pyxis":
        return ""
    mounts = [":".join(filter(None, mount)) for mount in _mounts(spec, folder)]
    # A task of a sweep has a folder of its own, whose name its script knows.
    there = shlex.quote(str(folder.path)) if spec.job.sweep is None else '"$CFE_RUN_DIR"'
    words = [f"--container-image={_image(spec)}", f"--container-mounts={','.join(mounts)}", *container.options]
    return f" {shlex.join(words)} --container-workdir={there}"


def contained(spec: RunSpec, folder: RunFolder, words: str) -> str:
    """Shell words that run `words`, shell words themselves, in the container; `words` where there is none, or srun
    makes it."""
    container = spec.job.environment.container
    if container.kind in ("none", "pyxis"):
        return words
    mounts = _mounts(spec, folder)
    if container.kind == "apptainer":
        devices = {"cuda": ["--nv"], "hpu": [], "cpu": []}[spec.plan.accelerator]
        options = [*devices, *(f"--bind={':'.join(filter(None, mount))}" for mount in mounts), *container.options]
        # Not as a word: for tasks of a sweep the shell knows it.
        return f'"$cfe_container" exec --pwd "$CFE_RUN_DIR" {shlex.join([*options, _image(spec)])} {words}'
    options = [f"--mount={source}:{target}:x-create=auto,{_enroot_flags(flags)}" for source, target, flags in mounts]
    start = shlex.join(["bash", "-c", _ENROOT, "bash", "--rw", *options, *container.options, _image(spec)])
    return f"{start} {shlex.join(['sh', '-c', _THERE, 'sh'])} {words}"


def _enroot_flags(flags: str) -> str:
    return ",".join(filter(None, ["rbind", *flags.split("+")]))


def _image(spec: RunSpec) -> str:
    container = spec.job.environment.container
    assert container.image is not None  # environment_problems asks for one
    file = stated_in(spec, "container.image")
    image = expand_path(container.image, os.environ, file=file, key="environment.container.image")
    return str(Path(image).absolute()) if image.startswith(".") else image


def _mounts(spec: RunSpec, folder: RunFolder) -> list[tuple[str, str, str]]:
    """(source, target, flags) of what ranks see: runs, code and this package under their own names, then the user's.

    Raises:
        ConfigError: one's path holds what separates the parts of a mount.
    """
    provenance, file = spec.provenance, stated_in(spec, "container.mounts")
    runs_root = str(folder.top.path.parent.parent)
    found = environment_folder(spec)
    environment = "" if found is None else str(found[1])
    own = [runs_root, provenance.workdir, provenance.work_tree or "", _package(), environment]
    stated: list[tuple[str, str, str]] = []
    for index, mount in enumerate(spec.job.environment.container.mounts):
        source, target, flags = mount_parts(mount)
        key = f"environment.container.mounts[{index}]"
        expanded = os.path.abspath(expand_path(source, os.environ, file=file, key=key))
        stated.append((expanded, expanded if target == source else target, flags))
    mounts = [(path, path, "") for path in dict.fromkeys(own) if path] + stated
    for source, _, _ in mounts:
        if re.search(r"[:,\n]", source):
            what, remedy = "holds a sign that no mount can have (: or ,)", "rename the folder"
            key = "environment.container.mounts"
            raise ConfigError([Problem(file=file, key=key, what=what, value=source, remedy=remedy)])
    return mounts


def _package() -> str:
    """The folder that cfe_hpc is imported from, where that is a checkout; "" where the image has its own."""
    parent = Path(cfe_hpc.__file__).resolve().parent.parent
    return "" if "site-packages" in parent.parts else str(parent)
