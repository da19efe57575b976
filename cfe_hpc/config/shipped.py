"""Finds job files and site profiles: by path, or by name among one's own and those that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cfe_hpc.config.nearest import nearest
from cfe_hpc.errors import ConfigError, Problem

__all__ = ["Kind", "available", "folders", "resolve", "shown"]

Kind = Literal["jobs", "site_configs"]

_WORD: dict[Kind, str] = {"jobs": "job file", "site_configs": "site profile"}


def folders(kind: Kind) -> list[Path]:
    """Folders searched for a bare name, first match wins: the current one's own, then the package's.

    In a wheel the package's lie under `cfe_hpc/shipped/`; in a checkout, editable installs included, beside it.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = [Path.cwd() / kind, package / "shipped" / kind, package.parent / kind]
    return [folder for folder in candidates if folder.is_dir()]


def available(kind: Kind) -> dict[str, Path]:
    """Every file that a bare name reaches, by name, sorted."""
    found: dict[str, Path] = {}
    for folder in folders(kind):
        for path in folder.glob("*.toml"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def resolve(ref: str, kind: Kind) -> Path:
    """The file that `ref` names: a path, a bare name (`train_seq`), or a shipped path (`jobs/train_seq.toml`).

    Raises:
        ConfigError: nothing of that name; lists what there is and the nearest.
    """
    path = Path(ref).expanduser()
    if path.is_file():
        return path
    named = path.parent in (Path("."), Path(kind))
    known = available(kind)
    stem = path.name.removesuffix(".toml")
    if named and stem in known:
        return known[stem]
    if path.is_dir():
        problem = Problem(file=ref, key="", what=f"is a folder, not a {_WORD[kind]}", remedy="name a TOML file")
        raise ConfigError([problem])
    near = nearest(stem, known) or _beside(path)
    hint = f"did you mean {near}? " if near else ""
    remedy = f"{hint}give a path, or one of: {', '.join(known) or 'none found'}"
    raise ConfigError([Problem(file=ref, key="", what=f"no such {_WORD[kind]}", remedy=remedy)])


def _beside(path: Path) -> str | None:
    """The file most like `path` in its folder."""
    try:
        there = [entry for entry in path.parent.iterdir() if entry.suffix == ".toml"]
    except OSError:
        return None
    near = nearest(path.name, [entry.name for entry in there]) or nearest(path.stem, [entry.stem for entry in there])
    return None if near is None else str(path.with_name(near).with_suffix(".toml"))


def shown(path: Path) -> str:
    """`path` as messages name it: relative when it lies under the current folder, as it stands otherwise."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
