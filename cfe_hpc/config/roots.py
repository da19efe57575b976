"""Where the runs of a site lie. Apart from its models, which take longer to load than most verbs run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cfe_hpc.errors import ConfigError, Problem

__all__ = ["DEFAULT_RUNS_ROOT", "DEFAULT_SITE", "expanded"]

DEFAULT_SITE = "local"
DEFAULT_RUNS_ROOT = "runs"


def expanded(runs_root: str, environ: Mapping[str, str], *, file: str) -> Path:
    """A profile's `storage.runs_root` as an absolute path; a relative one lies under the current folder.

    Args:
        file: the profile as messages name it.

    Raises:
        ConfigError: it names a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environ:
            what, remedy = f"variable {name} is not set", "set it, or name the folder outright"
            raise ConfigError([Problem(file=file, key="storage.runs_root", what=what, value=runs_root, remedy=remedy)])
        return environ[name]

    return Path(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, runs_root)).expanduser().absolute()
