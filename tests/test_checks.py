"""Every check has an example that fires it and no other, a row in docs/checks.md, and can be ignored, or says why not.

tests/checks/ID.job.toml is checked with ID.site.toml where there is one, else with good-site.toml, or with the site
that its first lines name. They also hold what is to be said, word for word; "…" stands for what differs from machine
to machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from check_examples import EXAMPLES, Stage, token_file, words_of

from cfe_hpc.cli.main import main
from cfe_hpc.config.checks import CHECKS
from cfe_hpc.launch.checks.checking import LOOKS


def _no_cluster(folder: Path) -> None:
    """What is asked is the profile alone, whatever cluster this machine belongs to."""
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HERE", str(here))
    _no_cluster(tmp_path / "none")
    monkeypatch.setenv("PATH", f"{tmp_path / 'none'}{os.pathsep}{os.environ['PATH']}")
    with ExitStack() as undo:
        yield Stage(here, monkeypatch, undo)


def _expected(id_: str) -> str:
    """What is to be said of an example, as its first line has it."""
    return (EXAMPLES / f"{id_}.job.toml").read_text().splitlines()[0]


@pytest.mark.parametrize("id_", CHECKS)
def test_the_example_of_a_check_fires_it_alone(id_: str, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    severity = CHECKS[id_].severity
    code = main(["check", *words_of(stage, id_), "--json"])
    printed = capsys.readouterr()
    findings = json.loads(printed.out)["findings"]
    assert [(finding["id"], finding["severity"]) for finding in findings] == [(id_, severity)]
    (finding,) = findings
    place = ": ".join(filter(None, (finding["file"], finding["key"])))
    value = "" if finding["value"] is None else f" ({finding['value']})"
    said = f"# {severity}: {place}: {finding['what']}{value}; {finding['remedy']}"
    expected = _expected(id_)
    assert re.fullmatch(".*".join(map(re.escape, expected.split("…"))), said), said
    if id_ in LOOKS:
        assert code == (1 if severity == "error" else 0)
    else:
        assert code == (2 if CHECKS[id_].firm and id_ not in ("launcher", "impossible") else 4)
        assert printed.err == f"{said[2:]}\n"


def test_every_check_has_one_example_and_every_example_a_check() -> None:
    assert len(CHECKS) >= 30
    assert {path.name.removesuffix(".job.toml") for path in EXAMPLES.glob("*.job.toml")} == set(CHECKS)
    sites = {path.name.removesuffix(".site.toml") for path in EXAMPLES.glob("*.site.toml")}
    assert sites <= set(CHECKS)
    assert set(LOOKS) <= set(CHECKS)


def test_a_good_job_is_good(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    job, site = EXAMPLES / "good-job.toml", EXAMPLES / "good-site.toml"
    assert main(["check", str(job), "--site", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.parametrize("id_", CHECKS)
def test_a_check_can_be_ignored_unless_nothing_could_be_sent(
    id_: str, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(stage, id_)
    code = main(["check", *words, "--json", "--ignore", id_])
    printed = capsys.readouterr()
    if CHECKS[id_].firm:
        own = _expected(id_)[2:]  # where the job cannot even be read
        refused = f"error: --ignore: cannot be ignored: nothing could be sent ({id_}); correct what it finds"
        assert code == 2 and printed.err.splitlines() in ([own], [refused])
    else:
        assert (code, printed.err) == (0, "")
        assert id_ not in {finding["id"] for finding in json.loads(printed.out)["findings"]}


def test_a_job_may_ignore_a_check_itself(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    job, *site = words_of(stage, "no-checkpoints")
    with (stage.here / job).open("a") as file:
        file.write('\n[checks]\nignore = ["no-checkpoints"]\n')
    assert main(["check", job, *site, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ignore", "git-dirt"], "--ignore: no such check (git-dirt); did you mean git-dirty?"),
        (["--ignore", "xyz"], "--ignore: no such check (xyz); docs/checks.md lists them all"),
        (
            ["--set", 'checks.ignore=["timee"]'],
            "--set: checks.ignore: no such check (timee); did you mean time?",
        ),
        (
            ["--set", 'checks.ignore=["batch"]'],
            "--set: checks.ignore: cannot be ignored: nothing could be sent (batch); correct what it finds",
        ),
    ],
)
def test_what_cannot_be_ignored_is_told(
    words: list[str], said: str, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(EXAMPLES / "good-job.toml"), *words]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_submit_refuses_what_would_fail_and_names_each_warning(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(stage, "cost"), "--dry-run"]
    assert main(["submit", *words]) == 4
    assert "resources.cost_max: one full attempt costs 400.00 EUR" in capsys.readouterr().err
    assert main(["submit", *words, "--ignore", "cost"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["submit", *words_of(stage, "saves-never"), "--dry-run"]) == 0
    assert capsys.readouterr().err.endswith("lower it [saves-never]\n")


def test_the_document_has_a_row_for_each_check() -> None:
    text = (EXAMPLES.parent.parent / "docs" / "checks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.*) \| (.*) \| (yes|no) \|$", text, re.MULTILINE)
    told = [(id_, row.severity, row.finds, row.fix, "no" if row.firm else "yes") for id_, row in CHECKS.items()]
    assert rows == told


@pytest.mark.parametrize(
    ("gres", "found"),
    [("gpu:{devices}", False), *((f"gpu:{name}:{{devices}}", False) for name in ("a100", "h100", "rtx6000", "l40s"))]
    + [(f"gpu:{name}:{{devices}}", True) for name in ("v100", "V100-32G", "tesla_v100", "t4", "rtx_2080ti", "rtx8000")],
)
def test_devices_without_bf16_are_known_by_their_names(
    gres: str, found: bool, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _, site = words_of(stage, "bf16-hardware")
    assert main(["check", job, "--site", site, "--set", f"site.hardware.h100.gres={gres}", "--json"]) == 0
    assert [finding["id"] for finding in json.loads(capsys.readouterr().out)["findings"]] == ["bf16-hardware"] * found


VARIANTS = [
    ("account", ["site.partitions.gpu.allowed_accounts=['other']"], "partition gpu does not take its jobs"),
    ("constraint", ["resources.constraint=[h100|nvlnk]*2"], "no node of h100 has the feature nvlnk"),
    ("constraint", ["resources.constraint=[h100|nvlink]*2"], None),
    ("array-size", ["site.slurm.array_max=1501"], None),
    ("gres-fixed", ["resources.devices_per_node=4"], None),
    ("gres-missing", ["site.partitions.gpu.options=['--gpus-per-node=4']"], None),
    ("gres-missing", ["site.partitions.gpu.exclusive=true"], None),
    ("threads", ["launch.environment.OMP_NUM_THREADS='16'"], None),
    ("cost", ["resources.time=7h"], None),
    (
        "model-memory",
        ["engine.zero_stage=1", "site.hardware.h100.device_memory=2500MB"],
        ("device-memory", "less than the "),
    ),
    ("model-memory", ["site.hardware.h100.device_memory=16GB"], None),
    ("quota", ["sweep.axes={'params.seed'=[1,2]}", "params.seed=0"], "3 checkpoints and the next one, for each of 2"),
    ("quota", ["site.storage.quota=1GB"], None),
    ("offload-stage", ["engine.zero_stage=3"], None),
    (
        "offload-stage",
        [
            "engine.deepspeed.zero_optimization.offload_param.device=none",
            "engine.deepspeed.zero_optimization.offload_optimizer={device='nvme',nvme_path='/tmp'}",
        ],
        "needs ZeRO stage 3,",
    ),
    (
        "offload-stage",
        [
            "engine.zero_stage=0",
            "engine.deepspeed.zero_optimization.offload_param.device=none",
            "engine.deepspeed.zero_optimization.offload_optimizer={device='cpu'}",
        ],
        "needs ZeRO stage 1 or above, and the job has stage 0",
    ),
    ("offload-path", ["engine.deepspeed.zero_optimization.offload_optimizer.nvme_path=/tmp"], None),
    ("optimizer", ["engine.deepspeed.zero_optimization.offload_optimizer.device=none"], None),
    ("optimizer", ["engine.deepspeed.optimizer={type='Adam',params={max_grad_norm=1.0}}"], "DeepSpeed refuses it"),
    (
        "unsaved-state",
        ["engine.deepspeed.zero_optimization={round_robin_gradients=false,zero_hpz_partition_size=4}"],
        "cfe_hpc cannot lay out",
    ),
    ("grad-accum", ["engine.zero_stage=1"], None),
    ("engine-unused", ["engine.deepspeed.wall_clock_breakdown=true", "engine.zero_stage=0"], "is DeepSpeed's, and the"),
    ("saves-never", ["checkpoint.every=15m"], None),
    ("no-checkpoints", ["checkpoint.every=15m"], None),
    ("no-checkpoints", ["checkpoint.every=4h"], ("saves-never", "an attempt ends after 4h: until then nothing is")),
    ("best-unlogged", ["checkpoint.keep_best=val_loss:min"], None),
    ("node-local-space", ["checkpoint.local_size=1GiB"], None),
    ("remote-package", ["checkpoint.remote=file:///elsewhere"], None),
    ("lead-short", ["resources.time=1d"], None),
    (
        "purged",
        ["checkpoint.keep_every_steps=100", "site.storage.purge_after=90d"],
        "checkpoints that are kept for good",
    ),
    ("gateway-loopback", ["metrics.pushgateway=http://[::1]:9091"], "is each machine's own address"),
    ("gateway-password", ["metrics.pushgateway=https://gateway:9091"], None),
    ("secret-in-job", ["params={hf_token='',x='AKIAABCDEFGHIJKLMNOP'}"], "looks like a password or a key"),
    ("secret-in-job", ["params={hf_token='',tokens='stdlib'}"], None),
    (
        "secret-in-job",
        ["params.hf_token=''", "launch.environment={WANDB_API_KEY='x'}"],
        "looks like a password or a key",
    ),
    ("resume-shapes", ["params.layers=8"], None),
    (
        "resume-shapes",
        ["checkpoint.resume_from=runs/j/j-20260101-000000-abcd"],
        "step 400 of j-20260101-000000-abcd was",
    ),
    ("resume-shapes", ["checkpoint.resume_from=gone-20260101-000000-abcd"], ("resume-missing", "there is no run in ")),
]
"""Of an example: what to change, and what is said of it then; nothing when None. Another check with its id."""


@pytest.mark.parametrize(("id_", "changes", "said"), VARIANTS)
def test_a_variant_of_an_example(
    id_: str,
    changes: list[str],
    said: str | tuple[str, str] | None,
    stage: Stage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for change in changes for word in ("--set", change)]
    main(["check", *words_of(stage, id_), *words, "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    if said is None:
        assert findings == []
    else:
        id_, what = (id_, said) if isinstance(said, str) else said
        assert [finding["id"] for finding in findings] == [id_]
        assert findings[0]["what"].startswith(what)
        assert "AKIA" not in str(findings)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no HDF5 at all", "is no HDF5 file"), (b"", "is no HDF5 file")],
)
def test_what_is_no_token_file(content: bytes, said: str, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(stage, "data-damaged")
    (stage.here / "tokens.h5").write_bytes(content)
    assert main(["check", *words]) == 1
    assert f"params.data: {said} (tokens.h5)" in capsys.readouterr().out
    token_file(stage.here / "tokens.h5")
    assert main(["check", *words]) == 0


def test_a_checkpoint_that_is_damaged_is_nothing_to_begin_with(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(stage, "resume-shapes")
    (manifest,) = stage.here.glob("runs/j/*/checkpoints/*/manifest.json")
    manifest.write_text(manifest.read_text().replace("layers", "lairs"))
    assert main(["check", *words]) == 1
    said = capsys.readouterr().out
    assert (
        "[resume-missing]" in said and "none of its checkpoints can be used" in said and "[resume-shapes]" not in said
    )
