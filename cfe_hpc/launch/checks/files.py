"""Checks of files: is the data there and whole, do all nodes see what they need, can programs be started?"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts
from cfe_hpc.process import CommandError, run

__all__ = [
    "data_damaged",
    "data_missing",
    "data_private",
    "git_dirty",
    "node_local_shared",
    "program_missing",
    "python_missing",
    "runs_root",
    "runs_root_private",
    "secret_in_job",
    "workdir_private",
]

_PRIVATE = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm", "/run")))
"""What each node has for itself, wherever Linux runs."""

_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_END = slice(28, 36)
"""Of a version 2 or 3 superblock with 8-byte offsets, as `data build` writes: where the file ends."""

_SECRET_NAMES = ("password", "passwd", "secret", "api_key", "apikey", "access_key", "auth_token", "hf_token")
_SECRET_VALUES = r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{36,}|hf_[A-Za-z]{30,}|glpat-[\w-]{20,}|sk-[\w-]{32,})\b"
_SECRET_LENGTH = 20
"""Shorter values are none of these."""


def _data(facts: Facts) -> Path | None:
    """The token file of the shipped training, where there is to be one."""
    if facts.params is None or facts.params.data == "stdlib" or "{stage." in facts.params.data:
        return None  # an earlier stage makes it
    # Without "..": whether a folder holds it is told by its parts.
    return Path(os.path.normpath(facts.workdir / Path(facts.params.data).expanduser()))


def data_missing(facts: Facts) -> Iterator[Problem]:
    path = _data(facts)
    if path is not None and not path.is_file():
        remedy = "build it with `cfe-hpc data build`, or check the path"
        yield facts.problem("job.params.data", "no such token file", remedy, facts.params.data)


def data_damaged(facts: Facts) -> Iterator[Problem]:
    path = _data(facts)
    if path is None or not path.is_file():
        return
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        yield facts.problem("job.params.data", f"cannot be read: {error.strerror}", "check its rights", str(path))
        return
    if not head.startswith(_HDF5):
        what = "is no HDF5 file"
    elif head[8] in (2, 3) and head[9] == 8 and int.from_bytes(head[_HDF5_END], "little") > size_bytes:
        what = f"is cut off: {int.from_bytes(head[_HDF5_END], 'little')} bytes were written, {size_bytes} are there"
    else:
        return
    remedy = "build it again with `cfe-hpc data build`; `cfe-hpc data check` reads a whole file"
    yield facts.problem("job.params.data", what, remedy, facts.params.data)


def _why_private(facts: Facts, path: Path) -> str | None:
    """Why nodes do not see a path; None where they do, or nothing tells."""
    if not facts.on_slurm:
        return None
    found, stated = path.resolve(), facts.site.storage.shared
    shared = [folder for text in (*stated, "~") for folder in _ways_to(text)]  # no cluster is without a shared home
    if any(place.is_relative_to(folder) for place in (path, found) for folder in shared):
        return None
    if stated and not any("$" in os.path.expandvars(text) for text in stated):  # a variable unset here tells nothing
        return f"lies under none of the folders that every node sees: {', '.join(stated)}"
    private = next((folder for folder in _PRIVATE if found.is_relative_to(folder)), None)
    return None if private is None else f"lies under {private}, which each node has for itself"


def _ways_to(folder: str) -> tuple[Path, Path]:
    """A folder as a profile spells it, and where its links lead."""
    path = Path(os.path.expandvars(folder)).expanduser()
    return path, path.resolve()


def data_private(facts: Facts) -> Iterator[Problem]:
    path = _data(facts)
    if path is not None and (why := _why_private(facts, path)) is not None:
        yield facts.problem("job.params.data", why, "copy it to a folder that every node sees", facts.params.data)


def workdir_private(facts: Facts) -> Iterator[Problem]:
    why = _why_private(facts, facts.workdir)
    if why is not None:
        what, remedy = f"nodes need this folder, and it {why}", "submit from a folder that every node sees"
        yield Problem(file=str(facts.workdir), key="", what=what, remedy=remedy)


def standing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def runs_root(facts: Facts) -> Iterator[Problem]:
    place = standing(facts.runs_root)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what, remedy = f"cannot be written under {place}", "choose a folder that you may write to"
        yield facts.problem("site.storage.runs_root", what, remedy, str(facts.runs_root))


def runs_root_private(facts: Facts) -> Iterator[Problem]:
    why = _why_private(facts, facts.runs_root)
    if why is not None:
        remedy = "choose a folder that every node sees"
        yield facts.problem("site.storage.runs_root", why, remedy, str(facts.runs_root))


def node_local_shared(facts: Facts) -> Iterator[Problem]:
    local = facts.site.storage.node_local
    if local is None or not facts.job.checkpoint.local:
        return
    path, _ = _ways_to(local)
    for folder in facts.site.storage.shared:
        if path.is_relative_to(_ways_to(folder)[0]):
            what = f"lies under {folder}, which all nodes share: a copy there is no nearer, and no safer"
            yield facts.problem("site.storage.node_local", what, "name a disk of each node, or its memory", local)


def program_missing(facts: Facts) -> Iterator[Problem]:
    job, environment = facts.job, facts.job.environment
    if job.entry is not None and environment.is_ours:
        top = job.entry.split(":")[0].split(".")[0]
        here = facts.workdir
        if find_spec(top) is None and not (here / top).is_dir() and not (here / f"{top}.py").is_file():
            what, remedy = f"no module named {top} here", "install it, or submit from the folder that holds it"
            yield facts.problem("job.entry", what, remedy, job.entry)
    if job.command is not None and not environment.modules and not environment.setup and environment.is_ours:
        program = job.command[0]
        if "{" not in program and shutil.which(program) is None:
            what, remedy = "no such program on this machine", "check the name, or name its path"
            yield facts.problem("job.command", what, remedy, program)


def python_missing(facts: Facts) -> Iterator[Problem]:
    environment = facts.job.environment
    key = next((key for key in ("python", "venv", "conda") if getattr(environment, key) is not None), None)
    if key is None or environment.container.kind != "none":
        return
    stated: str = getattr(environment, key)
    python = os.path.expanduser(os.path.expandvars(stated if key == "python" else f"{stated}/bin/python"))
    if python.startswith("/") and not os.access(python, os.X_OK):
        what, remedy = "no such interpreter on this machine", "correct the path; nodes start ranks with it"
        yield facts.problem(f"job.environment.{key}", what, remedy, python)


def secret_in_job(facts: Facts) -> Iterator[Problem]:
    job = facts.job
    tables = {"params": job.params, "launch.environment": job.launch.environment}
    tables["environment.variables"] = job.environment.variables
    named = [(f"job.{table}.{key}", key, value) for table, values in tables.items() for key, value in values.items()]
    words = [("job.command", "", word) for word in facts.job.command or ()]
    for key, name, value in (*named, *words):
        if isinstance(value, str) and value and _is_secret(name, value):
            # Without the value: that is what it is about.
            what = "looks like a password or a key, and run.toml keeps it for all who can read the folder"
            yield facts.problem(key, what, "let the program read it from a file that only you can read")


def _is_secret(name: str, value: str) -> bool:
    named = name.lower().replace("-", "_")
    if any(named == secret or named.endswith(f"_{secret}") for secret in _SECRET_NAMES):
        return True
    return len(value) >= _SECRET_LENGTH and re.search(_SECRET_VALUES, value) is not None


def git_dirty(facts: Facts) -> Iterator[Problem]:
    try:
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"], timeout_s=5).stdout.splitlines()
    except CommandError:  # no git, or no work tree: nothing to compare with
        return
    if changed:
        what = f"the work tree has uncommitted changes in {len(changed)} tracked files"
        remedy = "commit them so that the run can be repeated; the hash of the difference is recorded"
        yield Problem(file=str(facts.workdir), key="", what=what, remedy=remedy)
