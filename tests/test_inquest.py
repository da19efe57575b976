"""What an attempt finds out about the one before, with Slurm's commands as they answer on 22.05."""

from __future__ import annotations

import stat
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from launching import make_folder, make_spec

from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.inquest import dead_nodes, examine
from cfe_hpc.recovery.exclusions import excluded, runs_root
from cfe_hpc.runfolder import RunFolder

FACTS = RankFacts(
    scheduler="slurm",
    rank=0,
    local_rank=0,
    world_size=2,
    local_world_size=1,
    node_rank=0,
    num_nodes=2,
    hosts=("n5", "n6"),
    job_id="41",
    attempt=1,
)
NODE = "NodeName={} Arch=x86_64 State={} ThreadsPerCore=1 BootTime=2026-01-31T08:00:00 SlurmdStartTime={} Reason=x y"
LONG_AGO = "2026-01-31T08:00:00"


class Slurm:
    """Commands that print what a test tells them to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def answers(self, name: str, text: str | None) -> None:
        path = self._folder / name
        path.write_text("#!/bin/sh\nexit 1\n" if text is None else f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def nodes(self, **states: tuple[str, str]) -> None:
        self.answers("scontrol", "\n".join(NODE.format(name, *facts) for name, facts in states.items()))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    found = Slurm(folder)
    found.answers("sacct", None)
    found.nodes(n1=("ALLOCATED", LONG_AGO), n2=("DOWN*+CLOUD", LONG_AGO))
    return found


def begun(tmp_path: Path, **job: Any) -> tuple[RunFolder, Any]:
    """A run whose attempt 0 was on n1 and n2."""
    spec = make_spec(tmp_path, scheduler="slurm", job=job)
    folder = make_folder(tmp_path, spec)
    detail = {"job_id": "41", "hosts": ["n1", "n2"], "total_steps": 9}
    folder.append_event("started", attempt=0, host="n1", detail=detail)
    return folder, spec


def failed(folder: RunFolder) -> list[tuple[Any, Any, Any]]:
    return [(e["attempt"], e.get("host"), e["cause"]) for e in folder.events() if e["event"] == "failed"]


def test_a_node_that_is_down_is_named_counted_and_avoided(tmp_path: Path, slurm: Slurm) -> None:
    folder, spec = begun(tmp_path)
    folder.append_event("failed", attempt=0, rank=0, cause="communication", reason="Connection closed by peer")
    assert examine(folder, spec, FACTS) is None
    assert failed(folder)[1:] == [(0, "n2", "node_failure")]
    (exclusion,) = excluded(runs_root(folder), now_s=0.0)
    assert (exclusion.node, exclusion.cause, exclusion.why) == (
        "n2",
        "node_failure",
        "node n2 failed: it is DOWN*+CLOUD",
    )
    # Whoever comes after looks no second time.
    assert examine(folder, spec, FACTS) is None
    assert len(failed(folder)) == 2


def test_a_node_that_is_back_has_started_its_slurmd_anew(slurm: Slurm) -> None:
    slurm.nodes(n1=("IDLE", LONG_AGO), n2=("IDLE", "2026-01-31T12:00:00"), n3=("DOWN", LONG_AGO))
    since_s = datetime(2026, 1, 31, 10).timestamp()  # Slurm tells the node's own time
    found = dead_nodes(["n1", "n2"], since_s=since_s)
    assert found == {"n2": "its slurmd was started again at 2026-01-31T12:00:00"}
    slurm.answers("scontrol", None)
    assert dead_nodes(["n1", "n2"], since_s=since_s) == {}


def test_a_spent_budget_holds_the_run_before_it_begins(tmp_path: Path, slurm: Slurm) -> None:
    folder, spec = begun(tmp_path, recovery={"node_failures": 0})
    assert examine(folder, spec, FACTS) == 1
    held = folder.promised("held") or {}
    assert held["reason"].startswith("node failure number 1; the job allows 0 (recovery.node_failures): node n2 failed")
    assert (folder.result() or {})["state"] == "HELD"


def test_a_node_failure_that_the_ranks_were_told_of_is_counted_once(tmp_path: Path, slurm: Slurm) -> None:
    """Slurm said NODE_FAIL while they saved; which node it was they did not ask."""
    folder, spec = begun(tmp_path, recovery={"node_failures": 1})
    folder.append_event("requeued", attempt=0, reason="node_failure")
    assert examine(folder, spec, FACTS) is None
    assert failed(folder) == [(0, "n2", "node_failure")]
    folder.append_event("started", attempt=1, detail={"job_id": "41", "hosts": ["n1", "n2"]})
    folder.append_event("requeued", attempt=1, reason="node_failure")
    assert examine(folder, spec, replace(FACTS, attempt=2)) == 1


def test_a_node_failure_that_looked_like_a_requeue_by_somebody_else_is_one(tmp_path: Path, slurm: Slurm) -> None:
    """The batch script's node is well: Slurm requeues the job and tells the ranks there to stop, and no more."""
    folder, spec = begun(tmp_path, recovery={"node_failures": 1})
    folder.append_event("requeued", attempt=0, reason="requeued_already")
    assert examine(folder, spec, FACTS) is None
    assert failed(folder) == [(0, "n2", "node_failure")]
    assert [e["reason"] for e in folder.events() if e["event"] == "requeued"] == ["requeued_already", "node_failure"]
    folder.append_event("started", attempt=1, detail={"job_id": "41", "hosts": ["n1", "n2"]})
    folder.append_event("requeued", attempt=1, reason="requeued_already")
    assert examine(folder, spec, replace(FACTS, attempt=2)) == 1
    assert "node failure number 2" in (folder.promised("held") or {})["reason"]


def test_a_requeue_by_somebody_else_with_all_nodes_well_is_no_failure(tmp_path: Path, slurm: Slurm) -> None:
    slurm.nodes(n1=("IDLE", LONG_AGO), n2=("IDLE", LONG_AGO))
    folder, spec = begun(tmp_path)
    folder.append_event("requeued", attempt=0, reason="requeued_already")
    assert examine(folder, spec, FACTS) is None
    assert failed(folder) == []


@pytest.mark.parametrize("end", ["requeued", "held", "completed", "result", "unknown start"])
def test_an_end_that_somebody_told_of_is_not_looked_into(tmp_path: Path, slurm: Slurm, end: str) -> None:
    folder, spec = begun(tmp_path)
    if end == "requeued":
        folder.append_event("requeued", attempt=0, reason="preempted")
    elif end == "result":
        folder.write_result({"state": "FAILED"})
    elif end != "unknown start":
        folder.append_event(end, attempt=0)  # type: ignore[arg-type]
    facts = replace(FACTS, attempt=3) if end == "unknown start" else FACTS
    assert examine(folder, spec, facts) is None
    assert failed(folder) == []


def test_what_sacct_tells_of_another_end_wins(tmp_path: Path, slurm: Slurm) -> None:
    folder, spec = begun(tmp_path)
    slurm.answers("sacct", "PREEMPTED|2026-01-31T10:00:00\nRUNNING|Unknown")
    assert examine(folder, spec, FACTS) is None
    assert failed(folder) == []
    slurm.answers("sacct", "NODE_FAIL|2026-01-31T10:00:00\nRUNNING|Unknown")
    slurm.nodes(n1=("IDLE", LONG_AGO), n2=("IDLE", LONG_AGO))
    assert examine(folder, spec, FACTS) is None
    assert failed(folder) == [(0, None, "node_failure")]
