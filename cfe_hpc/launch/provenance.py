"""Where a run comes from: the state of the work tree, the versions of what matters, who and where."""

from __future__ import annotations

import os
import pwd
import re
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfe_hpc.process import CommandError, run
from cfe_hpc.runfolder import utc_now

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import Provenance

__all__ = ["WorkTree", "provenance"]

_GIT_TIMEOUT_S = 20.0
_PACKAGES = ("cfe-hpc", "submitit", "torch", "deepspeed", "h5py", "numpy", "pydantic")
_RECORD = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info")


class WorkTree:
    """Asks git about a folder beside whatever else there is to do; `commit` and `diff_sha256` wait for the answers."""

    def __init__(self, folder: Path) -> None:
        self._answers: dict[str, str | None] = {}
        git = ["git", "-C", str(folder)]
        # No textconv, external diff or colour: the hash must be the same for all who look at the same tree.
        diff = [*git, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color"]
        self._threads = [self._ask("commit", [*git, "rev-parse", "HEAD"]), self._ask("diff", diff)]

    @property
    def commit(self) -> str | None:
        """HEAD; None outside a work tree or without git."""
        answer = self._answer("commit")
        return None if answer is None else answer.strip()

    @property
    def diff_sha256(self) -> str | None:
        """Of `git diff HEAD`; None when there is no difference, or no work tree."""
        diff = self._answer("diff")
        if not diff:
            return None
        import hashlib  # late: it loads OpenSSL, and a clean tree needs none

        return hashlib.sha256(diff.encode()).hexdigest()

    def _answer(self, name: str) -> str | None:
        for thread in self._threads:
            thread.join()
        return self._answers[name]

    def _ask(self, name: str, argv: Sequence[str]) -> threading.Thread:
        def ask() -> None:
            try:
                self._answers[name] = run(argv, timeout_s=_GIT_TIMEOUT_S).stdout
            except CommandError:
                self._answers[name] = None

        thread = threading.Thread(target=ask, name=f"git-{name}", daemon=True)
        thread.start()
        return thread


def provenance(loaded: Loaded, work_tree: WorkTree) -> Provenance:
    """The provenance of a run of `loaded`, submitted now, from the current folder."""
    from cfe_hpc.config.run import Provenance  # late: git shall be at work while the models are being built

    python = loaded.site.environment.python
    return Provenance(
        user=_user(),
        host=socket.gethostname(),
        time=utc_now(),
        workdir=os.getcwd(),
        python=python or sys.executable,
        job_file=loaded.job_file,
        site_file=loaded.site_file,
        git_commit=work_tree.commit,
        git_diff_sha256=work_tree.diff_sha256,
        # Of another interpreter nothing is known here.
        versions={} if python not in (None, sys.executable) else _versions(),
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may know no name for the number
        return str(os.getuid())


def _versions() -> dict[str, str]:
    """Versions of what is installed, from the names of the records: reading these would cost more than the rest."""
    versions = {"python": sys.version.split()[0]}
    for folder in sys.path:
        if not os.path.isdir(folder):
            continue
        for record in map(_RECORD.fullmatch, os.listdir(folder)):
            if record is not None and record["name"].lower().replace("_", "-") in _PACKAGES:
                versions.setdefault(record["name"].lower().replace("_", "-"), record["version"])
    return versions
