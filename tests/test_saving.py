"""Asking a run for a checkpoint: who is refused, and when rank 0 hears of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_specs import RUN_ID, run_spec

from cfe_hpc.errors import UsageError
from cfe_hpc.launch.saving import request_save
from cfe_hpc.ranks import saverequests
from cfe_hpc.ranks.saverequests import SaveRequests
from cfe_hpc.runfolder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has not started."""
    folder = RunFolder(tmp_path / RUN_ID)
    folder.control.mkdir(parents=True)
    run_spec().write(folder.run_toml)
    return folder


def start(folder: RunFolder, attempt: int, **detail: Any) -> None:
    folder.append_event("started", attempt=attempt, host="n1", detail=detail)


def test_a_request_is_heard_once_by_the_attempt_that_runs(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saverequests, "_LOOK_EVERY_S", 0.0)
    start(folder, 0, total_steps=9)
    rank0 = SaveRequests(folder)
    assert not rank0.came()
    assert request_save(folder) == f"{RUN_ID}: attempt 0 saves at its next step, and trains on"
    request_save(folder)
    later = SaveRequests(folder)
    assert [rank0.came(), rank0.came(), rank0.came(), later.came()] == [True, True, False, False]
    assert json.loads((folder.control / "save-1").read_text())["attempt"] == 0


def test_the_folder_is_not_looked_at_in_every_step(folder: RunFolder) -> None:
    start(folder, 0, total_steps=9)
    rank0 = SaveRequests(folder)
    request_save(folder)
    assert not rank0.came()


def test_who_cannot_save_is_told_so(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match="is not training now"):
        request_save(folder)
    start(folder, 0, total_steps=9)
    folder.promise("requeued-0")
    with pytest.raises(UsageError, match="is not training now"):
        request_save(folder)
    folder.promise("held", reason="x")
    with pytest.raises(UsageError, match="has ended, or is held"):
        request_save(folder)
    assert folder.promised("save") is None


def test_a_program_that_never_joined_cannot_save(folder: RunFolder) -> None:
    spec = run_spec()
    command = spec.model_copy(update={"job": spec.job.model_copy(update={"entry": None, "command": ["true"]})})
    command.write(folder.run_toml)
    start(folder, 0, job_id="7")
    with pytest.raises(UsageError, match="never joined"):
        request_save(folder)
    start(folder, 0, job_id="7", total_steps=9)  # it joined
    request_save(folder)
