"""What the examples of tests/checks need before they can be checked: files, a run, a cluster's programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import h5py
import pytest

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.checkpoints.store import Content, save
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.train.config import Params

EXAMPLES = Path(__file__).resolve().parent / "checks"


class Stage:
    """A folder to check a job in, and what is to be undone afterwards."""

    def __init__(self, here: Path, patch: pytest.MonkeyPatch, undo: ExitStack) -> None:
        self.here, self.patch, self.undo = here, patch, undo


def token_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.create_dataset("tokens", data=b"x" * 10_000)


def _damaged_data(stage: Stage) -> None:
    path = stage.here / "tokens.h5"
    token_file(path)
    os.truncate(path, path.stat().st_size // 2)


def _data_elsewhere(stage: Stage) -> None:
    token_file(stage.here.parent / "elsewhere" / "tokens.h5")


def _dirty_work_tree(stage: Stage) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (stage.here / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True, timeout=30)
    (stage.here / "file").write_text("2")


def _full_disk(stage: Stage) -> None:
    full = stage.here / "full"
    full.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small disk can only be mounted by root")
    stage.undo.callback(subprocess.run, ["umount", str(full)], check=True, timeout=30)


def _open_port(stage: Stage) -> None:
    listening = stage.undo.enter_context(socket.socket())
    listening.bind(("", 0))
    listening.listen()
    job = stage.here / "port-taken.job.toml"
    # Ports that the kernel gives are among those of connections going out: that is another check.
    job.write_text(
        job.read_text().replace("1234", str(listening.getsockname()[1])) + '[checks]\nignore = ["port-ephemeral"]\n'
    )


def _earlier_run(stage: Stage) -> None:
    run = stage.here / "runs" / "j" / "j-20260101-000000-abcd"
    run.mkdir(parents=True)
    (run / "run.toml").write_text('[site]\nname = "checked"\n[plan]\npartition = "gpu"\n')
    measured = {"step_p95_s": 10.0, "save_p95_s": 400.0, "blocked_p95_s": 1.0, "interruptions": 0, "trained_s": 3600.0}
    (run / "result.json").write_text(json.dumps({"measured": measured}))


def _saved_run(stage: Stage) -> None:
    run = RunFolder(stage.here / "runs" / "j" / "j-20260101-000000-abcd")
    run.checkpoints.mkdir(parents=True)
    run.run_toml.write_text("")
    saved = Content(layout={"facts": {**Params().facts(), "global_batch": 64, "layers": 8}})
    save(run.checkpoints, saved, step=400, attempt=0, run_id=run.run_id, group=SoloGroup())


def _lustre(stage: Stage) -> None:
    """An `lfs` that answers as Lustre's does: nobody has Lustre on one machine."""
    program = stage.here / "bin" / "lfs"
    program.parent.mkdir()
    answers = "-u) echo; echo '      900*       0    1000       -      12       0   50000       -';;"
    none = "-g) echo '      900       0       0       -      12       0       0       -';;"
    program.write_text(f'#!/bin/sh\nprintf %s "$5"\ncase $3 in {answers} {none} esac\n')
    program.chmod(0o755)
    stage.patch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


_PREPARE: dict[str, Callable[[Stage], object]] = {
    "data-damaged": _damaged_data,
    "data-private": _data_elsewhere,
    "git-dirty": _dirty_work_tree,
    "disk-full": _full_disk,
    "port-taken": _open_port,
    "lead-short": _earlier_run,
    "quota-left": _lustre,
    "resume-shapes": _saved_run,
    "runs-root": lambda stage: (stage.here / "file").write_text(""),
    "gateway-password": lambda stage: stage.patch.setenv("CFE_PUSHGATEWAY_PASSWORD", "word"),
    "remote-tier": lambda stage: stage.patch.setitem(sys.modules, "fsspec", None),
    "metrics-package": lambda stage: stage.patch.setitem(sys.modules, "prometheus_client", None),
    "remote-package": lambda stage: stage.patch.setitem(sys.modules, "adlfs", None),
}


def words_of(stage: Stage, id_: str) -> list[str]:
    """JOB and --site of an example, its files copied to where it is checked and what it needs prepared."""
    names = [f"{id_}.job.toml", f"{id_}.site.toml" if (EXAMPLES / f"{id_}.site.toml").exists() else "good-site.toml"]
    for name in names:
        shutil.copy(EXAMPLES / name, stage.here)
    if id_ in _PREPARE:
        _PREPARE[id_](stage)
    named = re.search(r"^# site: (.*)$", (EXAMPLES / names[0]).read_text(), re.MULTILINE)
    return [names[0], "--site", named[1] if named else names[1]]
