"""The job scripts: one whole text as expected, and hostile values that must stay values."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import make_spec

from cfe_hpc.config.run import RunSpec
from cfe_hpc.config.site import Preemption
from cfe_hpc.errors import ConfigError
from cfe_hpc.launch.local import LocalBackend
from cfe_hpc.launch.slurm import SlurmBackend
from cfe_hpc.runfolder import RunFolder

GOLDEN = Path(__file__).parent / "golden" / "submission.sh"

HOSTILE = [
    "plain",
    "with space",
    'it\'s "quoted"',
    "; touch pwned #",
    "$(touch pwned) `touch pwned` ${HOME}",
    "line\nbreak\n#SBATCH --nodes=99\ntouch pwned",
    "100%j %t %A %%",
    "back\\slash\\",
    "ünï✓\t*?[a]~",
    "--leading",
]


def slurm_spec(workdir: Path, **changes: object) -> RunSpec:
    fields: dict[str, object] = {
        "nodes": 2,
        "devices_per_node": 4,
        "cpus_per_device": 3,
        "memory_bytes": 8 * 2**30 + 1,
        "time_s": 90_061.5,
        "gres": "gpu:h200:4",
        "account": "proj",
        "qos": "normal",
        "constraint": "a&b",
        "signal_lead_s": 120,
        "queue": "gpu-queue",
        "preemption": Preemption(mode="requeue", grace=10),
        "options": ["--exclusive", "--licenses=fs:1"],
        "python": "/opt/py thon/bin/python",
    }
    site = {
        "environment": {
            "modules": ["cuda/12.4"],
            "setup": ["umask 027"],
            "variables": {"A": "site", "B": "two words"},
        },
        "network": {"environment": {"NCCL_NET": "IB"}},
    }
    job = {"name": "train-seq", "command": ["true"], "launch": {"environment": {"A": "job's"}}}
    return make_spec(workdir, scheduler="slurm", site=site, job=job, **{**fields, **changes})


def script(spec: RunSpec, path: Path = Path("/runs/train-seq/train-seq-20260101-000000-abcd")) -> str:
    return SlurmBackend().preview(spec, RunFolder(path))


def test_the_whole_script_is_as_expected(tmp_path: Path) -> None:
    text = script(slurm_spec(tmp_path)).replace(str(tmp_path), "/some/where")
    # Where the package lies depends on how it is installed; that line has its own test.
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("export PYTHONPATH=")]
    assert "".join(lines) == GOLDEN.read_text()


def test_no_time_limit_and_no_memory_are_left_to_the_site(tmp_path: Path) -> None:
    text = script(slurm_spec(tmp_path, time_s=None, memory_bytes=None, gres=None, account=None))
    for option in ("--time", "--mem", "--gres", "--account", "--wckey"):
        assert f"#SBATCH {option}" not in text


def head_and_srun(text: str) -> tuple[set[str], str]:
    """The directives about nodes, tasks and cores; and srun's words about them."""
    words = ("--nodes", "--ntasks", "--cpus")
    head = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    (srun,) = [line for line in text.splitlines() if line.startswith("srun ")]
    return {option for option in head if option.startswith(words)}, srun[srun.index("--ntasks") : srun.index(" sh -c")]


def test_a_launcher_is_one_task_with_all_cores_of_a_nodes_ranks(tmp_path: Path) -> None:
    head, srun = head_and_srun(script(slurm_spec(tmp_path, launcher="torchrun", tasks_per_node=1)))
    assert head == {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12"}
    assert srun == '--ntasks="$((SLURM_JOB_NUM_NODES * 1))" --ntasks-per-node=1 --cpus-per-task=12'


def test_an_elastic_job_asks_for_cores_and_starts_its_ranks_on_what_it_got(tmp_path: Path) -> None:
    head, srun = head_and_srun(script(slurm_spec(tmp_path, nodes_min=1)))
    assert head == {"--nodes=1-2", "--cpus-per-task=12"}
    assert srun == '--ntasks="$((SLURM_JOB_NUM_NODES * 4))" --ntasks-per-node=4 --cpus-per-task=3'
    assert head_and_srun(script(slurm_spec(tmp_path, nodes_min=2))) == head_and_srun(script(slurm_spec(tmp_path)))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_variables_and_paths_reach_the_shell_unchanged(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path / text / "run")
    (folder.path / "logs").mkdir(parents=True)
    spec = slurm_spec(tmp_path, python="/bin/true")
    job = spec.job.model_copy(update={"launch": spec.job.launch.model_copy(update={"environment": {"VALUE": text}})})
    job = job.model_copy(update={"environment": job.environment.model_copy(update={"modules": []})})
    spec = spec.model_copy(update={"job": job})
    # srun stands for the node: it prints what a task would see.
    fakes = tmp_path / "bin"
    fakes.mkdir()
    (fakes / "srun").write_text('#!/bin/sh\nprintf "%s\\0" "$VALUE" "$CFE_RUN_DIR" "$PWD"\n')
    (fakes / "srun").chmod(0o755)
    written = script(spec, folder.path)
    (tmp_path / "submission.sh").write_text(written)
    environment = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", str(tmp_path / "submission.sh")], cwd=folder.path, env=environment, capture_output=True, timeout=30
    )
    log = folder.logs / "7.batch.out"
    printed = log.read_bytes() if log.exists() else done.stdout
    assert (done.returncode, done.stderr) == (0, b"")
    assert [item.decode() for item in printed.split(b"\0")[:3]] == [text, str(folder.path), str(folder.path)]
    assert not list(tmp_path.rglob("pwned"))
    # Slurm reads directives up to the first command alone; none of the user's text may pose as one before it.
    head = written[: written.index("# setup")]
    assert "--nodes=2\n" in head and "--nodes=99" not in head


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_job_names_become_harmless_ones(tmp_path: Path, name: str) -> None:
    spec = slurm_spec(tmp_path)
    text = script(spec.model_copy(update={"job": spec.job.model_copy(update={"name": name})}))
    (line,) = [line for line in text.splitlines() if line.startswith("#SBATCH --job-name=")]
    assert shlex.quote(line.partition("=")[2]) == line.partition("=")[2]


def test_backslashes_are_doubled_for_sbatch(tmp_path: Path) -> None:
    # sbatch takes a backslash for an escape even within single quotes (22.05).
    assert "#SBATCH --constraint='a\\\\b'" in script(slurm_spec(tmp_path, constraint="a\\b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"account": "a\nb"}, "job.toml: plan.account: holds a line break, which no #SBATCH line can (a\\nb)"),
        ({"options": ["-x node1"]}, "site.toml: partitions.p.options: not an sbatch option (-x node1)"),
        ({"options": ["--a\n#SBATCH --b"]}, "site.toml: partitions.p.options: not an sbatch option"),
    ],
)
def test_what_no_directive_can_hold_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        script(slurm_spec(tmp_path, **changes))
    assert str(caught.value).startswith(message)


def test_variables_with_impossible_names_or_values_are_refused_together(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, job={"launch": {"environment": {"A=B; rm": "x", "NUL": "a\0b"}}})
    with pytest.raises(ConfigError) as caught:
        LocalBackend().preview(spec, RunFolder(tmp_path))
    assert str(caught.value).splitlines() == [
        "job.toml: launch.environment: not a variable's name (A=B; rm); use letters, digits and underscores, "
        "no digit first",
        "job.toml: launch.environment.NUL: holds a NUL byte; environments cannot; remove it",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_local_script_hands_everything_on_unchanged(tmp_path: Path, text: str) -> None:
    workdir = tmp_path / text
    workdir.mkdir(exist_ok=True)
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\0" "$VALUE" "$PWD" "$@"\n')
    fake.chmod(0o755)
    spec = make_spec(workdir, python=str(fake), job={"launch": {"environment": {"VALUE": text}}})
    folder = RunFolder(workdir / "run")
    (tmp_path / "submission.sh").write_text(LocalBackend([text]).preview(spec, folder))
    done = subprocess.run(["bash", str(tmp_path / "submission.sh")], capture_output=True, timeout=30, check=True)
    module = ["-m", "cfe_hpc.launch.supervisor"]
    assert done.stdout.decode().split("\0")[:-1] == [text, str(workdir), *module, str(folder.path), "--", text]
