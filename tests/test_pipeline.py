"""Jobs with stages: how they are read, and what `submit`, `check`, `status` and `requeue` do with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import kill_quietly
from slurm_programs import calls, slurm

from cfe_hpc.cli.main import main
from cfe_hpc.config.load import load
from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.stage import filled_in, load_pipeline
from cfe_hpc.errors import ConfigError, PipelineError, UsageError
from cfe_hpc.launch.local import is_alive
from cfe_hpc.runfolder import RunFolder

__all__ = ["slurm"]  # a fixture

LINE = """
name = "line"
command = ["true"]
[resources]
time = "10m"
devices_per_node = 1
[params]
seed = 1
[[stage]]
name = "data"
command = ["sh", "-c", "echo 42 > $0/tokens", "{stage.train.nothing}"]
[[stage]]
name = "train"
entry = "trainer:run"
resources = { nodes = 2 }
params = { files = ["{stage.data.run_dir}/tokens"] }
checkpoint = { resume_from = "{stage.data.run_dir}" }
[[stage]]
name = "score"
after = ["data"]
[[stage]]
name = "export"
after = ["train", "score"]
command = ["cp", "{stage.train.checkpoints}/x", "{stage.train.exports}", "{stage.data.run_id}", "{params.seed}"]
""".replace(', "{stage.train.nothing}"', "")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own; supervisors left at the end are killed."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for record in tmp_path.glob("runs/*/*/control/job*"):
        job = json.loads(record.read_text())
        if "pid" in job and is_alive(job):
            kill_quietly(job["pid"])


def write(text: str) -> str:
    Path("job.toml").write_text(text, encoding="utf-8")
    return "job.toml"


def call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    """`cfe-hpc WORDS`; what it printed."""
    try:
        got = main([*map(str, words)])
    except SystemExit as end:  # argparse's
        got = int(end.code or 0)
    out, err = capsys.readouterr()
    assert got == code, err
    return out, err


def test_a_stage_is_the_job_but_for_what_it_changes() -> None:
    stages = {stage.name: stage for stage in load_pipeline(write(LINE), overrides=["stage.train.params.lr=2"])}
    assert {name: stage.after for name, stage in stages.items()} == {
        "data": (),
        "train": ("data",),
        "score": ("data",),
        "export": ("train", "score"),
    }
    data, train, score, export = (stage.loaded for stage in stages.values())
    assert [each.job.name for each in (data, export)] == ["line-data", "line-export"]
    assert (train.job.entry, train.job.command) == ("trainer:run", None), "a stage's program replaces the job's"
    assert (train.job.resources.nodes, train.job.resources.time) == (2, 600.0)
    assert train.job.params == {"seed": 1, "files": ["{stage.data.run_dir}/tokens"], "lr": 2}
    assert score.job.command == ["true"] and "lr" not in score.job.params
    assert train.origins["job.resources.nodes"] == "job.toml, stage train"
    assert train.origins["job.params.lr"] == "--set" and train.origins["job.params.seed"] == "job.toml"
    assert all(each.job.stage is None for each in (data, train, score, export))


def test_references_are_replaced_wherever_they_may_stand() -> None:
    values = {name: {"run_dir": f"/r/{name}", "run_id": f"{name}-1"} for name in ("data", "train")}
    values["train"] |= {"checkpoints": "/r/train/checkpoints", "exports": "/r/train/exports"}
    jobs = {stage.name: filled_in(stage.loaded.job, values) for stage in load_pipeline(write(LINE))}
    assert jobs["train"].params["files"] == ["/r/data/tokens"]
    assert jobs["train"].checkpoint.resume_from == "/r/data"
    assert jobs["export"].command == ["cp", "/r/train/checkpoints/x", "/r/train/exports", "data-1", "{params.seed}"]


def test_an_override_is_for_all_stages_or_for_one() -> None:
    stages = load_pipeline(write(LINE), overrides=["resources.time=20m", "stage.score.resources.time=5m"])
    assert [stage.loaded.job.resources.time for stage in stages] == [1200.0, 1200.0, 300.0, 1200.0]
    assert load("job.toml", overrides=["name=other"], stage="score").job.name == "other-score"


def test_one_stage_of_a_pipeline_must_be_named() -> None:
    job = write(LINE)
    with pytest.raises(PipelineError, match=r"job.toml: is a pipeline, with stages data, .*; name the one .*--stage"):
        load(job)
    assert load(job, stage="score").job.name == "line-score"
    with pytest.raises(UsageError, match=r"no such stage \(scor\); did you mean score\?"):
        load(job, stage="scor")
    with pytest.raises(UsageError, match=r"has no \[\[stage\]\]"):
        load("command_example", stage="score")
    with pytest.raises(UsageError, match=r"has no \[\[stage\]\]"):
        load_pipeline("command_example")


STAGES = 'name = "x"\ncommand = ["true"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage = []", "job.toml: stage: must be a list of tables; begin each stage with [[stage]]"),
        ("[stage]\nname = 'a'", "job.toml: stage: must be a list of tables; begin each stage with [[stage]]"),
        ("[[stage]]\nafter = []", "job.toml: stage[0].name: missing; write for example name = "),
        ("[[stage]]\nname = 'a b'", "stage[0].name: is no name for a stage (a b); use letters, digits, - and _ only"),
        ("[[stage]]\nname = 'a'\n[[stage]]\nname = 'a'", "stage[1].name: is the name of two stages (a); give each"),
        ("[[stage]]\nname = 'a'\nresorces = {}", "stage[0].resorces: unknown key; did you mean resources?"),
        ("[[stage]]\nname = 'a'\nresources = { nodes = 'x' }", "stage[0].resources.nodes: must be a whole number"),
        ("[[stage]]\nname = 'a'\nstage = [{}]", "stage[0].stage: a stage has no stages; list them one after another"),
        (
            "[[stage]]\nname = 'a'\n[[stage]]\nname = 'b'\nafter = ['A']",
            "stage[1].after[0]: no stage listed before it has that name (A); did you mean a? there are: a",
        ),
        ("[[stage]]\nname = 'a'\nafter = ['b']\n[[stage]]\nname = 'b'", "(b); the first stage waits for none"),
        (
            "[[stage]]\nname = 'a'\n[[stage]]\nname = 'b'\nlaunch = { nodes_min = 2 }",
            "job.toml, stage b: launch.nodes_min: more than resources.nodes (2); lower it",
        ),
        (
            "[[stage]]\nname = 'a'\n[[stage]]\nname = 'b'\ncommand = ['{stage.aa.run_dir}']",
            "job.toml, stage b: command[0]: refers to a stage that is not there: aa ({stage.aa.run_dir}); did you mean",
        ),
        (
            "[[stage]]\nname = 'a'\n[[stage]]\nname = 'b'\nafter = []\nparams = { x = '{stage.a.run_dir}' }",
            'params.x: refers to stage a, which b does not wait for ({stage.a.run_dir}); add "a" to its after',
        ),
        (
            "[[stage]]\nname = 'a'\n[[stage]]\nname = 'b'\ncommand = ['{stage.a.weights}']",
            "asks stage a for what it does not have: weights ({stage.a.weights}); of a stage there are: run_dir,",
        ),
    ],
)
def test_mistakes_in_stages_get_a_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(write(STAGES + text))
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_what_is_wrong_in_every_stage_is_told_once_and_all_of_it() -> None:
    text = LINE.replace('time = "10m"', 'time = "soon"').replace("nodes = 2", "nodes = 0")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(write(text), overrides=["stage.nope.params.x=1"])
    assert [problem.key for problem in caught.value.problems] == ["stage[1].resources.nodes"]
    with pytest.raises(ConfigError) as caught:
        load_pipeline(write(text.replace("nodes = 0", "nodes = 2")), overrides=["stage.train.launch.nodes_min=9"])
    assert [(problem.file, problem.key) for problem in caught.value.problems] == [
        ("job.toml", "resources.time"),
        ("--set", "launch.nodes_min"),
    ]
    with pytest.raises(ConfigError, match=r"--set: stage.nope.params.x: no such stage \(nope\)"):
        load_pipeline(write(LINE), overrides=["stage.nope.params.x=1"])


SHELL = """
name = "line"
resources = { devices_per_node = 1, time = "10m" }
[[stage]]
name = "data"
command = ["sh", "-c", "test ! -e fail || exit 3; echo 42 > tokens-$(basename $CFE_RUN_DIR)"]
[[stage]]
name = "train"
command = ["cp", "tokens-{stage.data.run_id}", "{stage.data.run_dir}/copy of it"]
[[stage]]
name = "score"
after = ["data", "train"]
command = ["cat", "{stage.data.run_dir}/{params.what} of it"]
params = { what = "copy" }
"""


def cfe(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The program itself, in a process of its own, on a site that looks often."""
    often = ["--set", "site.slurm.poll_interval=100ms"] if words[0] == "submit" else []
    argv = [sys.executable, "-m", "cfe_hpc", *words, *often]
    done = subprocess.run(argv, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def stages_of(document: dict[str, Any]) -> dict[str, RunFolder]:
    return {row["stage"]: RunFolder(Path(row["run_dir"])) for row in document["stages"]}


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def states(runs: dict[str, RunFolder]) -> list[str | None]:
    return [(run.result() or {}).get("state") for run in runs.values()]


def test_a_failure_stops_what_follows_and_a_requeue_brings_it_back_but_for_what_was_cancelled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("fail").touch()
    text = SHELL + '[[stage]]\nname = "export"\nafter = ["data"]\ncommand = ["true"]\n'
    runs = stages_of(json.loads(cfe("submit", write(text), "--wait", "--json", code=1).stdout))
    wait_until(lambda: all(states(runs)))
    assert states(runs) == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    told = json.loads(call(capsys, "status", runs["train"].run_id, "--json")[0])[0]
    assert told["reason"] == f"never started: {runs['data'].run_id}, which it waits for, ended FAILED"
    refused = call(capsys, "requeue", runs["score"].run_id, code=2)[1]
    assert f"{runs['score'].run_id}: waits: {runs['data'].run_id}: ended FAILED; requeue the one that failed" in refused
    runs["export"].promise("cancel", user="me")
    Path("fail").unlink()
    wait_until(lambda: not is_alive(runs["data"].promised("job") or {}))
    outcome = json.loads(cfe("requeue", runs["data"].run_id, "--json").stdout)
    assert outcome["followers"] == [runs["train"].run_id, runs["score"].run_id]
    wait_until(lambda: states(runs) == ["COMPLETED"] * 3 + ["CANCELLED"])


def test_a_pipeline_runs_here_and_its_stages_stand_on_runs_that_are_there_already(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = json.loads(cfe("submit", write(SHELL), "--wait", "--json").stdout)
    assert list(document) == ["run_id", "run_dir", "job_id", "site", "partition", "nodes", "world_size", "stages"]
    assert document["run_id"] == document["stages"][-1]["run_id"]
    runs = stages_of(document)
    assert states(runs) == ["COMPLETED"] * 3
    assert "42" in next(runs["score"].logs.glob("*.0.0.out")).read_text()
    frozen = RunSpec.read(runs["score"].run_toml)
    assert frozen.job.command == ["cat", f"{runs['data'].path}/{{params.what}} of it"]
    assert frozen.after == [str(runs["data"].path), str(runs["train"].path)]
    again = json.loads(cfe("submit", "job.toml", "--reuse", f"data={runs['data'].run_id}", "--wait", "--json").stdout)
    assert [row["stage"] for row in again["stages"]] == ["train", "score"]
    one = json.loads(
        cfe(
            *("submit", "job.toml", "--stage", "score", "--reuse", f"data={runs['data'].run_id}", "--wait", "--json")
        ).stdout
    )
    assert [row["stage"] for row in one["stages"]] == ["score"]
    assert RunSpec.read(stages_of(one)["score"].run_toml).after == [str(runs["data"].path)]
    err = call(capsys, "submit", "job.toml", "--stage", "score", code=2)[1]
    assert "stage score refers to data, which is not submitted with it" in err and "--reuse data=RUN" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reuse", "data"], "--reuse: data: is not STAGE=RUN"),
        (["--stage", "scor"], "--stage: no such stage (scor); did you mean score?"),
        (["--sweep", "params.x=1,2"], "--sweep: a pipeline is no sweep"),
        (["--set", "stage.nope.name=x"], "--set: stage.nope.name: no such stage (nope); there are: data, train, score"),
    ],
)
def test_mistakes_on_the_command_line_get_a_line(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    err = call(capsys, "submit", write(SHELL), *words, code=2)[1]
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_dry_run_shows_every_stage_and_writes_nothing(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    document = json.loads(call(capsys, "submit", write(SHELL), "--site", "minislurm", "--dry-run", "--json")[0])
    assert document["dry_run"] and [row["job_id"] for row in document["stages"]] == [None] * 3
    assert all(row["script"].startswith("#!/bin/bash\n") for row in document["stages"])
    printed = call(capsys, "submit", "job.toml", "--site", "minislurm", "--dry-run")[0]
    assert "stage       score, after data, train\n" in printed
    assert [path.name for path in here.iterdir()] == ["job.toml"]


def test_check_looks_at_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(call(capsys, "check", write(SHELL), "--json")[0])
    assert [(row["stage"], row["job"]) for row in document["stages"]] == [
        ("data", "line-data"),
        ("train", "line-train"),
        ("score", "line-score"),
    ]
    out, err = call(capsys, "check", "job.toml", "--set", "stage.train.resources.nodes=9", code=4)
    assert "stage score, after data, train\n" in out
    assert err.count("error: ") == 1 and "resources.nodes" in err


def test_slurm_is_told_what_each_stage_waits_for(capsys: pytest.CaptureFixture[str], slurm: Path) -> None:
    words = ("--site", "minislurm", "--set", "resources.partition=gpu")
    runs = stages_of(json.loads(call(capsys, "submit", write(SHELL), *words, "--json")[0]))
    sent = [line for line in calls(slurm) if line.startswith("sbatch")]
    assert len(sent) == 3 and "--dependency" not in sent[0]
    assert "--dependency=afterok:41 --kill-on-invalid-dep=yes" in sent[1]
    assert "--dependency=afterok:41:42 --kill-on-invalid-dep=yes" in sent[2]
    followers = [runs["data"].promised(name) or {} for name in ("dependent", "dependent-1")]
    assert [each["run_dir"] for each in followers] == [str(runs["train"].path), str(runs["score"].path)]


def test_a_stage_that_is_refused_takes_those_before_it_back(capsys: pytest.CaptureFixture[str], slurm: Path) -> None:
    (slurm / "refused").write_text("43\n")
    err = call(capsys, "submit", write(SHELL), "--site", "minislurm", code=3)[1]
    assert "sbatch: refused the job (Invalid qos specification)" in err
    runs = sorted(Path("runs").glob("*/*"))
    assert [path.parent.name for path in runs] == ["line-data", "line-train"]
    assert [(RunFolder(path).result() or {})["state"] for path in runs] == ["CANCELLED"] * 2
