"""Nodes that are avoided, attempts that another has followed, and sending a run back; without a scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from launching import events, make_folder, make_spec

from cfe_hpc.checkpoints.protocols import SoloGroup
from cfe_hpc.config.run import RunSpec
from cfe_hpc.ranks.avoiding import exclude_option, tell_requeued
from cfe_hpc.ranks.env import read_facts
from cfe_hpc.ranks.preflight import leave_avoided
from cfe_hpc.ranks.stopping import send_back
from cfe_hpc.recovery.exclusions import Exclusion, choose, exclude, excluded, exclusions_folder, runs_root
from cfe_hpc.recovery.fencing import begin, superseded
from cfe_hpc.runfolder import RunFolder

# As sinfo of Slurm 22.05 prints it with -h -N -o "%N %t"; a node stands there once for each partition of -p.
STATES = {"n1": "idle", "n2": "mix", "n3": "idle~", "n4": "down*", "n5": "drng", "n6": "alloc"}


def exclusion(node: str, until_s: float = 2e9, **facts: Any) -> Exclusion:
    return Exclusion(
        **{"cause": "node_failure", "why": "it died", "run_id": "r", "attempt": 0, **facts}, node=node, until_s=until_s
    )


def test_a_node_is_avoided_until_its_time_is_over(tmp_path: Path) -> None:
    assert excluded(tmp_path, now_s=0) == []
    short, long = exclusion("n1", 100.0), exclusion("n2.cluster", 200.0)
    exclude(tmp_path, short)
    exclude(tmp_path, long)
    assert excluded(tmp_path, now_s=99.0) == [long, short]
    assert excluded(tmp_path, now_s=100.0) == [long]
    assert [path.name for path in exclusions_folder(tmp_path).iterdir()] == ["n2.cluster.json"]


def test_what_is_said_of_a_node_is_never_cut_short(tmp_path: Path) -> None:
    exclude(tmp_path, exclusion("n1", 200.0))
    exclude(tmp_path, exclusion("n1", 100.0, why="again", attempt=1))
    (found,) = excluded(tmp_path, now_s=0)
    assert (found.until_s, found.why, found.attempt) == (200.0, "again", 1)


@pytest.mark.parametrize("node", ["", "../n1", "n1,n2", "-n1", "n[1-2]", "a b"])
def test_only_a_name_of_a_node_is_avoided(tmp_path: Path, node: str) -> None:
    with pytest.raises(ValueError, match="no name of a node"):
        exclude(tmp_path, exclusion(node))
    folder = exclusions_folder(tmp_path)
    folder.mkdir(exist_ok=True)
    facts = {"node": node, "until_s": 2e9, "cause": "nan", "why": "", "run_id": "r", "attempt": 0}
    (folder / "n1.json").write_text(json.dumps(facts))
    assert excluded(tmp_path, now_s=0) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"node": "n1"}', '{"node": "n1", "until_s": "soon"}', "\0"])
def test_a_file_that_says_nothing_is_passed_over(tmp_path: Path, content: str) -> None:
    exclude(tmp_path, exclusion("n2"))
    (exclusions_folder(tmp_path) / "n1.json").write_text(content)
    assert [found.node for found in excluded(tmp_path, now_s=0)] == ["n2"]


def test_many_who_write_at_once_lose_nothing(tmp_path: Path) -> None:
    names = [f"n{k}" for k in range(24)]
    writers = [threading.Thread(target=exclude, args=(tmp_path, exclusion(name))) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert {found.node for found in excluded(tmp_path, now_s=0)} == set(names)


@pytest.mark.parametrize(
    ("nodes", "nodes_max", "avoided"), [(1, 9, "abc"), (2, 4, "ab"), (4, 4, ""), (5, 4, ""), (1, 4, "abc"), (2, 3, "a")]
)
def test_as_many_nodes_as_the_job_takes_are_left(nodes: int, nodes_max: int, avoided: str) -> None:
    found = [exclusion(name) for name in "abc"]
    assert choose(found, nodes=nodes, nodes_max=nodes_max) == (list(avoided), list("abc"[len(avoided) :]))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sinfo and scontrol that know the nodes above, and note what they were asked; scontrol refuses while `busy` is."""
    programs = tmp_path / "programs"
    programs.mkdir()
    lines = "".join(f"{node} {state}\n" * (1 + (node == "n1")) for node, state in STATES.items())
    texts = {
        "sinfo": f'echo "$@" >>{programs}/asked\ncat <<END\n{lines}END\n',
        "scontrol": f'echo "$@" >>{programs}/asked\n[ ! -e {programs}/busy ] || {{ rm {programs}/busy; exit 1; }}\n',
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs


def slurm_run(root: Path, **plan: Any) -> tuple[RunFolder, RunSpec]:
    spec = make_spec(root, scheduler="slurm", **plan)
    return make_folder(root, spec), spec


@pytest.mark.usefixtures("told")
def test_a_job_is_kept_off_the_nodes_that_it_might_get(tmp_path: Path) -> None:
    folder, spec = slurm_run(tmp_path, nodes=2)
    assert exclude_option(folder, spec.plan) == []
    for node in ("n1", "gone", "n4"):
        exclude(runs_root(folder), exclusion(node))
    assert exclude_option(folder, spec.plan) == ["--exclude=n4,n1"]
    assert events(folder, "degraded") == []


def test_a_question_that_the_signal_of_a_requeue_has_ended_is_asked_again(tmp_path: Path, told: Path) -> None:
    sinfo, once = told / "sinfo", told / "once"
    once.touch()
    sinfo.write_text(sinfo.read_text().replace("\n", f"\n[ ! -e {once} ] || {{ rm {once}; kill -TERM $$; }}\n", 1))
    folder, spec = slurm_run(tmp_path, nodes=2)
    exclude(runs_root(folder), exclusion("n1"))
    assert exclude_option(folder, spec.plan) == ["--exclude=n1"]
    assert not once.exists()


@pytest.mark.usefixtures("told")
def test_a_job_that_needs_every_node_takes_the_one_that_failed_longest_ago(tmp_path: Path) -> None:
    folder, spec = slurm_run(tmp_path, nodes=3)  # of n1, n2, n3 and n6
    for node, until_s in (("n1", 2e9), ("n2", 2.1e9), ("n3", 2.2e9)):
        exclude(runs_root(folder), exclusion(node, until_s))
    assert exclude_option(folder, spec.plan) == ["--exclude=n3"]
    spared = [(event["reason"], event["host"]) for event in events(folder, "degraded")]
    assert spared == [("exclusion_spared", "n2"), ("exclusion_spared", "n1")]


@pytest.mark.usefixtures("told")
def test_what_the_site_excludes_by_itself_stays_excluded(tmp_path: Path) -> None:
    folder, spec = slurm_run(tmp_path, nodes=2, options=["--exclude=n[1-2]", "--exclusive"])
    exclude(runs_root(folder), exclusion("n1"))
    assert exclude_option(folder, spec.plan) == []
    exclude(runs_root(folder), exclusion("n3"))
    assert exclude_option(folder, spec.plan) == []  # n3 and n6 are all that is left
    exclude(runs_root(folder), exclusion("n4"))
    assert exclude_option(folder, spec.plan) == ["--exclude=n4,n[1-2]"]  # down, and perhaps back when the job begins


@pytest.mark.parametrize(("queue", "asked"), [("gpu", "-h -N -p gpu -o %N %t"), ("", "-h -N -o %N %t")])
def test_a_job_that_names_no_partition_might_get_any_node(tmp_path: Path, told: Path, queue: str, asked: str) -> None:
    folder, spec = slurm_run(tmp_path, nodes=1, queue=queue)
    exclude(runs_root(folder), exclusion("n1"))
    assert exclude_option(folder, spec.plan) == ["--exclude=n1"]
    assert (told / "asked").read_text().splitlines()[0] == asked


def test_without_an_answer_of_slurm_nothing_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, spec = slurm_run(tmp_path)
    exclude(runs_root(folder), exclusion("n1"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert exclude_option(folder, spec.plan) == []


def test_a_requeued_job_is_told_even_if_slurm_is_busy(tmp_path: Path, told: Path) -> None:
    folder, spec = slurm_run(tmp_path)
    tell_requeued(folder, spec.plan, "7", attempt=0)
    assert not (told / "asked").exists()  # nobody has ever excluded anything
    exclude(runs_root(folder), exclusion("n2", time.time() + 60))
    (told / "busy").touch()
    tell_requeued(folder, spec.plan, "7", attempt=0)
    asked = [line for line in (told / "asked").read_text().splitlines() if line.startswith("update")]
    assert asked == ["update JobId=7 ExcNodeList=n2"] * 2
    exclude(runs_root(folder), exclusion("n2", 1.0, attempt=1))
    os.unlink(exclusions_folder(runs_root(folder)) / "n2.json")
    tell_requeued(folder, spec.plan, "7", attempt=1)
    assert (told / "asked").read_text().splitlines()[-1] == "update JobId=7 ExcNodeList="


def test_an_attempt_on_an_avoided_node_goes_back_once(tmp_path: Path, told: Path) -> None:
    folder, spec = slurm_run(tmp_path)
    environment = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
    facts = read_facts({**environment, "SLURM_JOB_NODELIST": "n2"})
    exclude(runs_root(folder), exclusion("n1"))
    assert leave_avoided(folder, spec, facts) is None
    exclude(runs_root(folder), exclusion("n2"))
    assert leave_avoided(folder, spec, facts) == 0
    (back,) = events(folder, "requeued")
    assert (back["reason"], back["attempt"]) == ("requeue_requested", 0)
    assert "n2 is avoided since r failed there: it died" in back["detail"]
    assert "requeue 7" in (told / "asked").read_text().splitlines()
    assert leave_avoided(folder, spec, facts) is None


class Refusing:
    """A scheduler that must not be asked."""

    def why(self, signals: list[str]) -> Any:
        raise AssertionError

    def stopping_already(self) -> bool:
        raise AssertionError

    def requeue(self, *, next_attempt: int) -> str:
        raise AssertionError


def test_a_budget_that_is_spent_holds_the_run_and_still_excludes_the_node(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, job={"recovery": {"node_failures": 0}})
    folder = make_folder(tmp_path, spec)
    folder.append_event("failed", attempt=0, host="n3", cause="node_unfit", reason="preflight: n3: no device")
    verdict = send_back(folder, Refusing(), spec, SoloGroup(), cause="node_unfit", why="preflight: n3", attempt=0)
    assert (verdict.action, verdict.exit_code) == ("held", 1)
    assert "node_failures" in (folder.promised("held") or {})["reason"]
    assert (folder.result() or {})["state"] == "HELD"
    (found,) = excluded(runs_root(folder), now_s=time.time())
    assert (found.node, found.cause, found.run_id) == ("n3", "node_unfit", folder.run_id)
    assert "no device" in found.why
    assert [event["reason"] for event in events(folder, "degraded")] == ["node_excluded"]


def test_a_job_that_avoids_nothing_excludes_nothing(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, job={"recovery": {"node_failures": 0, "exclude_nodes_for": "0s"}})
    folder = make_folder(tmp_path, spec)
    folder.append_event("failed", attempt=0, host="n3", cause="node_unfit", reason="preflight: n3: no device")
    send_back(folder, Refusing(), spec, SoloGroup(), cause="node_unfit", why="preflight: n3", attempt=0)
    assert excluded(runs_root(folder), now_s=0) == []


def test_only_a_later_attempt_supersedes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, make_spec(tmp_path))
    assert superseded(folder, 0) is None
    for attempt in (0, 1, 10, 2):
        begin(folder, attempt)
        begin(folder, attempt)
    assert [superseded(folder, attempt) for attempt in (0, 2, 9, 10, 11)] == [10, 10, 10, None, None]
    assert superseded(RunFolder(tmp_path / "nowhere"), 0) is None


def test_the_program_of_an_attempt_that_another_has_followed_is_killed(tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path, job={"command": [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]}
    )
    folder = make_folder(tmp_path, spec)
    place = {"CFE_RANK": "0", "CFE_LOCAL_RANK": "0", "CFE_WORLD_SIZE": "1", "CFE_LOCAL_WORLD_SIZE": "1"}
    wrapper = subprocess.Popen(
        [sys.executable, "-m", "cfe_hpc.ranks", str(folder.path)],
        env={**os.environ, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert wrapper.stdout is not None and wrapper.stdout.readline() == "up\n"
        begin(folder, 1)
        # The program has the same pipes: they end with the last of the two.
        _, said = wrapper.communicate(timeout=60)
    finally:
        wrapper.kill()
    assert wrapper.returncode == 1
    assert "attempt 1 has begun: attempt 0 ends here" in said
    assert events(folder, "failed", "completed") == [] and folder.result() is None
