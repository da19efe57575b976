"""Every epoch's end: saved, kept, and made into a file when the run has completed, here and on the real Slurm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import call, document, new_run, put
from run_specs import run_spec
from safetensors.torch import load_file
from slurm.cluster import Cluster
from spine.harness import LiveRun, site_file, write_job

from cfe_hpc.checkpoints import marks
from cfe_hpc.launch.exporting import export_script
from cfe_hpc.runfolder import RunFolder

EPOCHS = {"name": "epochs", "entry": "entries:epochs", "params": {"steps": 9, "epoch_steps": 4}}


def steps_of(run: LiveRun) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.folder.checkpoints.iterdir() if path.is_dir())


def exported(run: LiveRun) -> dict[str, float]:
    """The one number of each epoch's file, which is the step after which it was saved."""
    return {path.name: load_file(path)["step"].item() for path in sorted(run.folder.exports.glob("*.safetensors"))}


@pytest.mark.parametrize("asynchronous", [True, False] if os.environ.get("CFE_TEST_FULL") else [True])
def test_every_epoch_is_kept_and_exported_when_the_run_has_completed(tmp_path: Path, asynchronous: bool) -> None:
    checkpoint = {"keep_last": 1, "every_steps": 1, "export_epochs": "bf16", "async": asynchronous}
    job = write_job(tmp_path, **EPOCHS, resources={"devices_per_node": 1}, checkpoint=checkpoint)
    run = LiveRun.submit(job, "local", cwd=tmp_path, env=os.environ)
    assert run.wait_result()["state"] == "COMPLETED"
    run.wait(lambda: (run.folder.exports / "epoch-00001.safetensors").exists(), 60, "exported")
    assert exported(run) == {"epoch-00000.safetensors": 4.0, "epoch-00001.safetensors": 8.0}
    assert load_file(run.folder.exports / "epoch-00000.safetensors")["step"].dtype == torch.bfloat16
    assert steps_of(run) == [4, 8, 9]
    assert not list(run.folder.checkpoints.glob(".*")), "nothing is left to be deleted"


@pytest.mark.slurm
@pytest.mark.slow
def test_slurm_exports_in_a_job_that_waits_for_the_run(cluster: Cluster, tmp_path: Path) -> None:
    resources = {"nodes": 1, "devices_per_node": 1, "cpus_per_device": 1, "partition": "spot"}
    job = write_job(tmp_path, **EPOCHS, resources=resources, checkpoint={"keep_last": 1, "export_epochs": "fp32"})
    before = cluster.job_ids()
    run = LiveRun.submit(job, site_file(tmp_path), cwd=tmp_path, env=cluster.env)
    (export,) = cluster.job_ids() - before - {run.job_id}
    waiting = cluster.job(export)
    assert f"afterok:{run.job_id}" in waiting["Dependency"] and waiting["JobName"] == "epochs-export"
    assert run.wait_result()["state"] == "COMPLETED"
    assert cluster.wait_for_end(export) == "COMPLETED", (run.folder.logs / f"{export}.export.err").read_text()
    assert exported(run) == {"epoch-00000.safetensors": 4.0, "epoch-00001.safetensors": 8.0}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with the ends of two epochs, the second saved by two attempts at different steps."""
    run = new_run(tmp_path / "runs", keep_last=1, keep_epochs=True)
    for step, epoch, attempt in ((3, 0, 0), (5, 1, 0), (6, 1, 1), (7, None, 1)):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, step)
        path = put(run, {"model": model}, step=step, attempt=attempt)
        if epoch is not None:
            marks.put(path, "epoch", epoch=epoch)
    return run


def test_the_files_of_epochs_are_made_once(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "export", folder.path, "--epochs")
    assert found["files"] == ["epoch-00000.safetensors", "epoch-00001.safetensors"]
    values = [load_file(folder.exports / name)["weight"].item() for name in found["files"]]
    assert values == [3.0, 6.0], "what a later attempt saved is the last"
    (folder.exports / "epoch-00000.safetensors").unlink()
    assert document(capsys, "export", folder.path, "--epochs")["files"] == ["epoch-00000.safetensors"]
    code, out, _ = call(capsys, "export", folder.path, "--epochs")
    assert (code, out) == (0, f"every epoch has its file in {folder.exports}\n")


def test_ends_of_epochs_stay_until_they_are_unpinned(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "prune", folder.path)
    assert found["kept"] == {"3": ["epoch"], "5": ["epoch"], "6": ["epoch"], "7": ["last", "newest verified"]}
    assert call(capsys, "pin", folder.path, "--step", 3, "--unpin")[1] == "step-000000003  unpinned\n"
    assert document(capsys, "prune", folder.path)["deleted"] == [3]


def slurm_spec(**site: Any) -> Any:
    spec = run_spec(checkpoint={"export_epochs": "bf16"}, resources={"account": "proj'1"})
    return spec.model_copy(update={"site": spec.site.model_copy(update=site)})


def test_the_job_that_exports_asks_for_no_device(tmp_path: Path) -> None:
    spec = slurm_spec()
    hardware = next(iter(spec.site.hardware.values()))
    partition = next(iter(spec.site.partitions.values()))
    gpu = hardware.model_copy(update={"accelerator": "cuda", "gres": "gpu:{devices}"})
    cpu = hardware.model_copy(update={"accelerator": "cpu", "gres": None})
    partitions = {
        spec.plan.partition: partition.model_copy(update={"hardware": "gpu"}),
        "small": partition.model_copy(update={"hardware": "cpu", "queue": "cpu long", "default_time": 3600.0}),
    }
    folder = RunFolder(tmp_path / "a b")
    script = export_script(
        slurm_spec(partitions=partitions, hardware={"gpu": gpu, "cpu": cpu}), folder, log=("out", "err")
    )
    lines = script.splitlines()
    assert {"#SBATCH --partition='cpu long'", "#SBATCH --time=01:00:00", "#SBATCH --ntasks=1"} <= set(lines)
    assert "gres" not in script
    assert lines[-1].endswith(f"checkpoints export '{tmp_path}/a b' --epochs --dtype bf16 --json")
    alone = export_script(
        slurm_spec(partitions={spec.plan.partition: partitions[spec.plan.partition]}, hardware={"gpu": gpu}),
        folder,
        log=("out", "err"),
    )
    assert f"#SBATCH --partition={partition.queue or spec.plan.partition}" in alone and "gres" not in alone
