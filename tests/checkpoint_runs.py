"""Run folders with checkpoints in them, for tests of what is done to checkpoints from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoint_groups import all_good, run_ranks
from run_specs import run_spec

from cfe_hpc.checkpoints.store import save
from cfe_hpc.checkpoints.tracked import capture
from cfe_hpc.cli.main import main
from cfe_hpc.runfolder import RunFolder


def new_run(root: Path, **checkpoint: Any) -> RunFolder:
    """A run without checkpoints, whose job has these keys in [checkpoint]."""
    run = RunFolder.create(root, "demo")
    run_spec(run_id=run.run_id, name="demo", checkpoint=checkpoint).write(run.run_toml)
    return run


def put(run: RunFolder, objects: Mapping[str, Any], *, step: int, ranks: int = 2, attempt: int = 0) -> Path:
    """Save objects that all ranks hold alike; the checkpoint's folder."""

    def work(group: Any) -> Any:
        content = capture(objects, group=group)
        words = {"step": step, "attempt": attempt, "run_id": run.run_id, "group": group}
        return save(run.checkpoints, content, metrics={"loss": abs(step - 2.0)}, **words)

    return all_good(run_ranks(ranks, work))[0].path


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """`cfe-hpc checkpoints WORDS`: exit code, standard output and error."""
    try:
        code = main(["checkpoints", *map(str, words)])
    except SystemExit as end:  # argparse's
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    """What --json prints."""
    got, out, err = call(capsys, *words, "--json")
    assert got == code, err
    return json.loads(out)


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
