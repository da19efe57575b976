"""What one must know to speak to a Pushgateway: its URL, and the user and password that never stand in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from cfe_hpc.errors import ConfigError, Problem

__all__ = ["Credentials", "check_url", "read_credentials"]

USER, PASSWORD, PASSWORD_FILE = (
    "CFE_PUSHGATEWAY_USER",
    "CFE_PUSHGATEWAY_PASSWORD",
    "CFE_PUSHGATEWAY_PASSWORD_FILE",
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """For basic authentication. The password does not show in its repr."""

    user: str
    password: str = field(repr=False)


def check_url(url: str, *, file: str = "run.toml", key: str = "metrics.pushgateway") -> Problem | None:
    """What is wrong with a gateway's URL, if anything. A password in it is not repeated.

    Args:
        file: where the URL came from, for the message.
        key: its dotted key there.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return Problem(file=file, key=key, what=f"is no URL: {error}", remedy='write "http://host:9091"')
    if parts.username is not None or parts.password is not None:
        remedy = f"take them out of the URL and set {USER} and {PASSWORD} (or {PASSWORD_FILE}) in the environment"
        return Problem(file=file, key=key, what="holds a user or a password", remedy=remedy)
    if parts.scheme not in ("http", "https") or not host:
        return Problem(file=file, key=key, what="is no http or https URL", value=url, remedy='write "http://host:9091"')
    if parts.query or parts.fragment:
        return Problem(file=file, key=key, what="holds a query or a fragment", value=url, remedy="end it at the path")
    return None


def read_credentials(environ: Mapping[str, str] | None = None) -> Credentials | None:
    """The user and password of the environment; None when it names no user.

    The password is CFE_PUSHGATEWAY_PASSWORD's value, or the first line of the file that CFE_PUSHGATEWAY_PASSWORD_FILE
    names.

    Raises:
        ConfigError: a user without a password, or a password file that is missing or that others may read.
    """
    env = os.environ if environ is None else environ
    user = env.get(USER)
    if not user:
        return None
    if env.get(PASSWORD):
        return Credentials(user, env[PASSWORD])
    if not env.get(PASSWORD_FILE):
        remedy = f"set {PASSWORD}, or {PASSWORD_FILE} to a file that only you can read"
        raise ConfigError([Problem(file=USER, key="", what="is set without a password", remedy=remedy)])
    return Credentials(user, _read_password(Path(env[PASSWORD_FILE]).expanduser()))


def _read_password(path: Path) -> str:
    problem = ""
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            problem, remedy = "can be read by others", f"chmod 600 {path}"
        else:
            return path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        problem, remedy = f"cannot be read ({type(error).__name__})", "check the path and its rights"
    raise ConfigError([Problem(file=PASSWORD_FILE, key="", what=problem, value=str(path), remedy=remedy)])
