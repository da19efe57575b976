"""Where a run comes from: the state of the work tree, the versions of what matters, who and where."""

from __future__ import annotations

import os
import pwd
import re
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cfe_hpc.process import CommandError, run
from cfe_hpc.runfolder import utc_now

if TYPE_CHECKING:
    from cfe_hpc.config.load import Loaded
    from cfe_hpc.config.run import Provenance

__all__ = ["Listing", "WorkTree", "provenance"]

_GIT_TIMEOUT_S = 20.0
_PACKAGES = ("cfe-hpc", "submitit", "torch", "deepspeed", "h5py", "numpy", "pydantic")
_RECORD = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of a work tree, as git sees them.

    Attributes:
        top: the folder that all paths are relative to.
        tracked: path to git's mode and hash of what the index holds.
        changed: tracked paths that are not as the index has them: edited, or gone.
        untracked: paths that git neither tracks nor ignores.
    """

    top: Path
    tracked: Mapping[str, tuple[str, str]]
    changed: frozenset[str]
    untracked: tuple[str, ...]


class WorkTree:
    """Asks git about a folder beside whatever else there is to do; everything asked of it waits for the answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._head: list[str] = []
        self._diff: str | None = None
        self._listing: Listing | None = None
        self._unlisted: str | None = None
        self._thread = threading.Thread(target=self._ask, name="git", daemon=True)
        self._thread.start()

    @property
    def commit(self) -> str | None:
        """HEAD; None outside a work tree, without git, or before the first commit."""
        self._thread.join()
        return self._head[1] if len(self._head) > 1 else None

    @property
    def diff_sha256(self) -> str | None:
        """Of `git diff HEAD`; None when there is no difference, or no work tree."""
        self._thread.join()
        if not self._diff:
            return None
        import hashlib  # late: it loads OpenSSL, and a clean tree needs none

        return hashlib.sha256(self._diff.encode()).hexdigest()

    @property
    def listing(self) -> Listing | None:
        """The files; None outside a work tree or without git."""
        self._thread.join()
        return self._listing

    @property
    def unlisted(self) -> str | None:
        """Why there is no `listing` of a work tree that is there; None when there is one, or no work tree."""
        self._thread.join()
        return self._unlisted

    def again(self) -> WorkTree:
        """The same folder, asked anew."""
        return WorkTree(self._folder)

    def _ask(self) -> None:
        # Before the first commit it prints the folder, and then fails.
        said, refused = _git(self._folder, "rev-parse", "--show-toplevel", "HEAD")
        head = said.splitlines()
        if not head or not os.path.isabs(head[0]):
            if "safe.directory" in refused:  # git names the command that mends it in its last line
                self._unlisted = f"git trusts no folder that somebody else owns; {refused.splitlines()[-1].strip()}"
            return
        self._head = [line for line in head if line != "HEAD"]
        top = Path(head[0])
        # Of what is ignored nothing is asked: that may be a million files.
        wanted = ("--stage", "--modified", "--deleted", "--others", "--exclude-standard")
        listed, refused = _git(top, "ls-files", "-t", "-z", *wanted)
        if refused:
            self._unlisted = refused.splitlines()[-1].strip()
            return
        self._listing = _listing(top, listed)
        # No textconv, external diff or colour: the hash must be the same for all who look at the same tree.
        self._diff, _ = _git(top, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color")


def _git(folder: Path, *words: str) -> tuple[str, str]:
    """What git prints, and why it has failed: nothing unless it has, or is not there, or takes too long."""
    try:
        # It takes no lock: somebody may be at work in the folder.
        argv = ["git", "--no-optional-locks", "-C", str(folder), *words]
        done = run(argv, timeout_s=_GIT_TIMEOUT_S, check=False)
    except CommandError as error:
        return "", str(error)
    return done.stdout, "" if done.returncode == 0 else done.stderr.strip() or f"git: status {done.returncode}"


def _listing(top: Path, listed: str) -> Listing:
    """The files from what `ls-files -t -z --stage …` has printed: a letter, git's facts, a tab and the path; of files
    that it does not track a question mark and the path."""
    tracked: dict[str, tuple[str, str]] = {}
    changed, untracked = set[str](), list[str]()
    for entry in filter(None, listed.split("\0")):
        letter, rest = entry[0], entry[2:]
        if letter == "?":
            untracked.append(rest)
            continue
        facts, _, path = rest.partition("\t")
        mode, blob, _stage = facts.split(" ")
        tracked[path] = (mode, blob)
        if letter in "CRM":  # edited, gone, or being merged
            changed.add(path)
    return Listing(top=top, tracked=tracked, changed=frozenset(changed), untracked=tuple(untracked))


def provenance(loaded: Loaded, work_tree: WorkTree, *, snapshot: Path | None = None) -> Provenance:
    """The provenance of a run of `loaded`, submitted now, from the current folder.

    Args:
        snapshot: the copy of `work_tree` that its ranks run; they run the folder itself when None.
    """
    from cfe_hpc.config.run import Provenance  # late: git shall be at work while the models are being built
    from cfe_hpc.launch.interpreter import interpreters

    python, host_python = interpreters(loaded)
    top = None if snapshot is None or work_tree.listing is None else work_tree.listing.top
    return Provenance(
        user=_user(),
        host=socket.gethostname(),
        time=utc_now(),
        workdir=os.getcwd(),
        python=python,
        host_python=host_python,
        job_file=loaded.job_file,
        site_file=loaded.site_file,
        git_commit=work_tree.commit,
        git_diff_sha256=work_tree.diff_sha256,
        work_tree=None if top is None else str(top),
        snapshot=None if snapshot is None else str(snapshot),
        start_in=None if snapshot is None or top is None else str(snapshot / Path.cwd().relative_to(top)),
        # Of another interpreter nothing is known here.
        versions=_versions() if python == sys.executable else {},
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
