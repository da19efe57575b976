"""What looks like a secret, by name or by content: a snapshot of code holds none."""

from __future__ import annotations

import re
from fnmatch import translate
from functools import cache

__all__ = ["secret_content", "secret_name"]

_NAMES = (
    ".env", ".env.*", "*.env", ".netrc", ".pgpass", ".htpasswd", ".npmrc", ".pypirc", ".git-credentials",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.ppk", "id_*", "kubeconfig", "service-account*.json",
)  # fmt: skip
_HARMLESS = (".env.example", ".env.sample", ".env.template", "*.pub")
_WORDS = frozenset({"token", "secret", "secrets", "password", "passwords", "credential", "credentials", "apikey"})
_CODE = frozenset(
    {".py", ".pyi", ".pyx", ".ipynb", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".go", ".js", ".ts",
     ".sh", ".bash", ".sbatch", ".md", ".rst", ".html", ".css", ".sql", ".tcl", ".lua", ".r", ".jl"}
)  # fmt: skip
"""A program that deals with tokens is no token. What it holds is looked at all the same."""

_CONTENT = (
    rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
    rb"|\bAKIA[0-9A-Z]{16}\b"  # AWS
    rb"|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9_]{50,}"
    rb"|\bglpat-[A-Za-z0-9_-]{20}\b"  # GitLab
    rb"|\bhf_[A-Za-z]{34}\b"  # Hugging Face
    rb"|\bxox[abprs]-[A-Za-z0-9-]{20,}"  # Slack
    rb"|\bsk-(?:proj-|ant-)[A-Za-z0-9_-]{20,}"
    rb"|\bAIza[0-9A-Za-z_-]{35}\b"  # Google
    rb"|\bnpm_[A-Za-z0-9]{36}\b"
)


def secret_name(path: str) -> bool:
    """Whether a file's name, whatever its folder, is one that secrets have."""
    name = path.rpartition("/")[2].lower()
    if _matching(_HARMLESS).match(name):
        return False
    if f".{name.rpartition('.')[2]}" in _CODE:
        return False
    return bool(_matching(_NAMES).match(name)) or bool(_WORDS & set(re.split(r"[^a-z]+", name)))


def secret_content(content: bytes) -> bool:
    """Whether it holds a key as the well-known issuers write them."""
    return _content().search(content) is not None


@cache
def _content() -> re.Pattern[bytes]:
    return re.compile(_CONTENT)


@cache
def _matching(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))
